"""Rules by trial: an operator without a rule runs on small inputs, whole and in parts."""
