"""The report: a plan as one HTML page that needs no network."""
