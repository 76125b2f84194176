"""The conditions under which a captured program is that of a call, checked before every run."""
