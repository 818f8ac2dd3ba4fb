"""From a model and example inputs to one canonical graph, and what that graph leaves out."""
