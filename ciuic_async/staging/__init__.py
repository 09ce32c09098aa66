"""Host memory that we own: slots, their budget, and the copies into them."""
