"""How good a model is, measured: pictures against their prompts (alignment.py), autoencoders against pictures (reconstruction.py)."""
