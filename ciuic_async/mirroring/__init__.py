"""A second copy of a chain, elsewhere: copied behind the commits, and brought home when the first is lost."""
