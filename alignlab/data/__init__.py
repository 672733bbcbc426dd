"""Clips with captions and reference images: generated (`shapes`) or read from a folder."""
