"""Other frameworks, one file each, imported only on use."""
