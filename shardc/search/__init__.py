"""Search: which mesh, how many micro-batches and which batch make the fastest plan for a number of devices."""
