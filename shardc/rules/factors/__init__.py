"""The factors of a program: which pieces of dims its operators share. Start at `factored.py`."""
