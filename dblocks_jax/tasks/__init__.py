"""What is trained: one room a task, where a network becomes a denoiser."""
