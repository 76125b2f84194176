"""The invariants of every stage of the compiler: small functions, each with the sentence that people read."""
