"""AccuQuant: diffusion models calibrated over windows of denoising steps (NeurIPS 2025)."""
