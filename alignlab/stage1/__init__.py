"""Stage 1 of SARA and MoAlign: networks that are trained once, then frozen inside an objective."""
