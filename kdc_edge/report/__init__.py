"""Blocks of one HTML page in one file, and charts as inline SVG: no script, nothing to fetch. Knows no benchmark."""
