"""The commands of the command line, one a file: a dataclass whose fields are its flags, with a method `run`."""
