"""What several tests compile and run: models, random programs, odd operators, sample calls of operators."""
