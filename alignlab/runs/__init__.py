"""Run folders, and how files get into them whole."""
