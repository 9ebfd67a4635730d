"""Can this run on these machines? Asked before any model is built."""
