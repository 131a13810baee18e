"""The command line: one module a command; what is heavy is imported inside the command that needs it.

Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 the work failed (one line says what and what to do),
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

from kdc_edge.cli.app import app
from kdc_edge.errors import KdcError

__all__ = ["app", "main"]


def main() -> None:
    try:
        app()
    except KdcError as error:
        print(f"kdc-edge: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("kdc-edge: interrupted", file=sys.stderr)
        sys.exit(130)
