"""What the papers on pruning with quantization claim, one file a method: `python -m benchmarks.claims`."""
