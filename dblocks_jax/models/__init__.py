"""Flax NNX vision transformers, plain and noise-conditioned. They know nothing of diffusion."""
