"""What a graph tells of the masks of attention, and what becomes of them."""
