"""Other libraries, held back: logs below ERROR, warnings, and what they print.

    with quiet():
        network = UNet2DConditionModel.from_pretrained(folder)

They talk about their own insides, where nobody here can act on it, and stdout is for data. Exceptions pass.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*, progress: bool = False) -> Iterator[None]:
    """Silence other libraries in this process; with `progress`, what they print goes to stderr instead."""
    out = sys.stderr if progress else io.StringIO()
    before = logging.root.manager.disable
    handler = logging.NullHandler()  # onnxruntime.quantization calls logging.basicConfig, which this makes a no-op
    logging.root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(handler)
