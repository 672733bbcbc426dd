"""The checks that every objective passes, also those of other packages."""
