"""AJPQ: one search over bits per channel, where a channel of 0 bits is a channel that goes."""
