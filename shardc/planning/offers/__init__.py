"""Which strategies are offered to an operator: listed by what every mesh axis does, or near a plan."""
