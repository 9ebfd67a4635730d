"""What a run leaves for its user."""
