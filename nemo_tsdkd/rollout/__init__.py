"""Who decodes when, and which tokens are drawn: no model in here."""
