"""Text and other sequences of symbols, uncovered from behind masks (masked diffusion)."""
