"""The ranks that train one run together."""
