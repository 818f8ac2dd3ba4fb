"""Files for other runtimes, run there before they are handed over."""
