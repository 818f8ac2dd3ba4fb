"""A compressed model as a folder: no pickle, no code."""
