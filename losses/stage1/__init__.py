"""The frozen Stage 1 networks that SARA and MoAlign read."""
