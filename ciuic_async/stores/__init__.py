"""Where named byte strings live: one protocol (base), one file for each kind of place."""
