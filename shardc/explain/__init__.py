"""What a plan says and answers: `plan.py`, why, why not, conflicts, assumptions."""
