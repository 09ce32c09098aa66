"""Options that are not in the code: from the environment, and from files."""
