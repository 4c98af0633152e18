"""Low-rank and other adapters: their files, their mathematics, and how they change a model's weights."""
