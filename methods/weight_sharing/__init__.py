"""Weights that share their values: codebooks, hashed weights, product quantization."""
