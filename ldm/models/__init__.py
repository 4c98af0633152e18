"""The networks (floor 1): torch only; they know nothing of diffusion, of prompts or of files."""
