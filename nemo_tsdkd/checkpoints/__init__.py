"""Model folders on disk: what is in one, when it counts. No torch."""
