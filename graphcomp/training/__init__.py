"""Training any method: the prepared module, the loop, its folder and its processes."""
