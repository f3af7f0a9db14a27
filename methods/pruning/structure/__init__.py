"""What structured pruning stands on: which channels belong together, how much removing them saves, and the surgery."""
