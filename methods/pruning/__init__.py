"""Pruning: zeros (magnitude) and smaller layers (neuron merging)."""
