"""Training: from a configuration and a store of tokens to a run's folder. Import its modules by name."""
