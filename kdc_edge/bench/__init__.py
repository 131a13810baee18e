"""Measuring bundles and reporting what was measured.

record.py holds what a benchmark knows, measure.py and worker.py find it out, report.py writes it as a table,
Markdown, CSV, JSON or HTML; page.py and charts.py are the building blocks of every HTML report.
"""
