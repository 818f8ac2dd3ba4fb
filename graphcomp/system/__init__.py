"""What the machine gives: locks, whole files, threads, a progress line."""
