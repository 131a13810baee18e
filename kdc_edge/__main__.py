"""python -m kdc_edge: the command line."""

from kdc_edge.cli import main

main()
