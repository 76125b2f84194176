"""Sample calls of every operator that has a rule, by what the operators do."""
