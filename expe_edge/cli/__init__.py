"""The command line: one thin command per file, heavy imports inside the command."""
