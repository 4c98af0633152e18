"""Training: one loop for every stage of the model (first stage, text encoder, denoiser)."""
