"""Read and validate user data, one module per format, reporting all errors together."""
