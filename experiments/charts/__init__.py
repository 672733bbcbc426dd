"""Charts for pages and papers: one look, drawn by matplotlib as SVG and PDF, no browser needed."""
