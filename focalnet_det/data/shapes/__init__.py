"""Generate the dataset `shapes`: overlapping textured shapes on textured backgrounds."""
