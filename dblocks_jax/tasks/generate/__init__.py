"""Noise to images, given a class."""
