"""transformers: models that were cut are saved and loaded by its own `save_pretrained` and `from_pretrained`."""
