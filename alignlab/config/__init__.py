"""The settings of a run as frozen pydantic models, and recipe files as plain mappings."""
