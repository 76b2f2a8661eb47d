"""Labels to images, by a diffusion transformer."""
