"""Commands and options of the command line that belong to this room."""
