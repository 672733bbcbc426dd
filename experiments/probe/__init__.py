"""Pages and tables that look into runs and teachers."""
