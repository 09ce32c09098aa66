"""What to keep, and how the rest goes."""
