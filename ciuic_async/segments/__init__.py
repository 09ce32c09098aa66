"""Immutable files of records: written by the compiled core or by its plain reference, read back with every check."""
