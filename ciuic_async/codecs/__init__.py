"""Between raw bytes and records: one short file per codec."""
