"""Facts about a lowered program, each computed once: liveness, memory, time."""
