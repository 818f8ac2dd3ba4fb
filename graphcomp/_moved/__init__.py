"""Modules under their former names, which pickles of earlier versions hold. Nothing else imports them."""
