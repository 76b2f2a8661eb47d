"""Data sets, batches, and what happens to them on their way to the device."""
