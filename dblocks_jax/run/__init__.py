"""The run's folder and surroundings: checkpoints, logs, lock, signals, processes, devices, random streams, errors."""
