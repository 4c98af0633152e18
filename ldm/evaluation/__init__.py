"""How good a model is: pictures against their prompts (alignment.py), the first stage (reconstruction.py)."""
