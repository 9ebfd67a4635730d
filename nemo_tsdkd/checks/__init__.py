"""Checks, before any model is built, that a run can work on its machines."""
