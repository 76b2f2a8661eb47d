"""The diffusion core: noise levels, preconditioning, loss and sampler. It knows nothing of images or transformers."""
