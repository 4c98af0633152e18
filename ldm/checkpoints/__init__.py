"""Model files in and out: `safe` (validation, loading, atomic writing, manifests) and `folder` (diffusers' layout)."""
