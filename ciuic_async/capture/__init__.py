"""From live training state to a plan of tensors and plain values, and back (flatten, inflate)."""
