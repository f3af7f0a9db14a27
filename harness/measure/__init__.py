"""Latency, memory, size, counts, accuracy and fidelity of a deployed artifact."""
