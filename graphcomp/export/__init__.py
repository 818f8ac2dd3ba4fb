"""What leaves graphcomp: the user's own class, a checkpoint folder."""
