"""Layers: what pruning, weight sharing and quantization have in common.

The weights that they treat (:mod:`methods.layers.prunable`), what flows into each layer
(:mod:`methods.layers.activations`), attention written out as layers (:mod:`methods.layers.attention`), and training
that keeps zeros (:mod:`methods.layers.prunable`).
"""
