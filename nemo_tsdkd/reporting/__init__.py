"""Files that a run writes for its user: metrics, plots, provenance."""
