"""How ranks connect, and which rank holds which token ids."""
