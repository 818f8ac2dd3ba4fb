"""Quantization as rewrite passes: specs, quantizers, placement, calibration, lowering to integers."""
