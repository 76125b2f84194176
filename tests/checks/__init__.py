"""What several tests judge by: brute force, closed forms, allocations, eager mode; and how long random tests search."""
