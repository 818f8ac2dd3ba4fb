"""QST: thresholds of pruning and steps of quantization, trained together from scratch."""
