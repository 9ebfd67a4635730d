"""How the ranks meet, and who holds which token ids."""
