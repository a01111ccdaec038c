"""Floor 1: one file an operation (schema, reference, native, gradient), and the choice between backends."""
