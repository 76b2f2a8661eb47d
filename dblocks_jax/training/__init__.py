"""The trainer, which knows no task: parts, step, optimizer, curriculum, residence, the loop."""
