"""transformers: models that were cut are saved, loaded and compared in its own ways."""
