"""Reports: summary, statistics, verdict, charts, tables, pages."""
