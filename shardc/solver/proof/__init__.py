"""Certificates: `prove.py` finds them; `certificate.py`, `remainder.py` check them and use nothing of the search."""
