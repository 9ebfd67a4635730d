"""NeMo checkpoints: written, read, and converted from and to Hugging Face."""
