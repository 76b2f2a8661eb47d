"""DiffusionBlocks in JAX: transformers trained one block at a time as denoisers of the target."""
