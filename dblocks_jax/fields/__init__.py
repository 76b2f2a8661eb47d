"""What can be set: every field of a config, with its default and its meaning."""
