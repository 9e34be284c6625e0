"""Parameter names of the public copies: one table of rows per layout, and the translation."""
