"""The user's own class with smaller parameters, verified against the sliced graph."""
