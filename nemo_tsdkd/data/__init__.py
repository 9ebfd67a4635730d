"""Rows of a data set -> samples -> micro-batches."""
