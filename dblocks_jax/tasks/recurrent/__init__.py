"""Text by recurrent depth: a core that is run again and again, or trained as a denoiser in one pass."""
