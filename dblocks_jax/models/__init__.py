"""Flax NNX transformers for images: plain, noise-conditioned, and DiT. They know nothing of diffusion."""
