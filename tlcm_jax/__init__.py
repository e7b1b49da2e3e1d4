"""Few-step distillation of latent diffusion models on TPUs and GPUs, from prompts alone."""
