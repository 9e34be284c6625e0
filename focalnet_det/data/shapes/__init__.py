"""Generate the data set `shapes`: textured shapes that overlap on textured backgrounds."""
