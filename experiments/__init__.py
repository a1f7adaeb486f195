"""The experiment framework around the optimizer: data, tasks, training, records."""
