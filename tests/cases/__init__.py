"""Small models and loaders that people really have, after public bug reports of other tools."""
