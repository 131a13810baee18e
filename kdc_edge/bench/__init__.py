"""Measuring bundles and reporting the measurements.

case.py says what to measure, measure.py times it, in processes that worker.py and runner.py arrange, record.py holds
the rows. budget.py chooses a row, search.py measures until that can be done, compare.py sets two reports side by side.
tables.py writes terminal tables, Markdown and CSV, page.py the HTML page.
"""
