"""Units of memory, in bytes: what a constant or a message counts in."""

MIB = 2**20
GIB = 2**30
