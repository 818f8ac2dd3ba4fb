"""Methods that decide in training what goes: one paper, one file or folder."""
