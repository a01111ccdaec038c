"""What dropout is said to do inside a model, measured on a trained one."""
