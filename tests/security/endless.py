"""kdc-edge with a command that does not end: it writes a folder, and says so on its standard error."""

import sys
import time
from pathlib import Path

from kdc_edge.cli import app, main
from kdc_edge.files import atomic_folder


def endless(*_: object, **__: object) -> None:
    with atomic_folder(Path(sys.argv[1])):
        Path(sys.argv[2]).write_text("in")
        time.sleep(600)


app.app = endless  # type: ignore[assignment]
main()
