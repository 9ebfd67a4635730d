"""Cached decoding with Megatron's layers, and the responses written with it."""
