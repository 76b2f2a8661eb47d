"""What the launcher can do: one file for each `--mode`."""
