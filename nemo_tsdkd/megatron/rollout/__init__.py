"""Cached decoding with Megatron's layers, and generation of responses with it."""
