"""The demo: a small teacher that reasons in steps lifts a weak student, on problems and with a verifier of others."""
