"""GETA: joint structured pruning and quantization-aware training (QASSO)."""
