"""When a snapshot is due (docs/interval.md). Others see ``rules``, which asks ``account``, which asks ``meter``."""
