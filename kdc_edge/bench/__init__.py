"""Measuring bundles and reporting the measurements.

record.py holds the rows, measure.py and worker.py take them, runner.py and grid.py arrange processes and grids,
tables.py writes them as a table, Markdown, CSV or JSON, page.py as one HTML page.
"""
