"""coremltools, imported quietly: away from macOS it warns about each of Apple's libraries that is missing.

ct = load_coremltools("running a Core ML bundle")
"""

from __future__ import annotations

import logging
from typing import Any

from kdc_edge.errors import require


def load_coremltools(purpose: str) -> Any:
    """The package; MissingPackageError names the extra to install. It then logs errors only."""
    log = logging.getLogger("coremltools")
    log.setLevel(logging.ERROR)  # its module adds no handler and sets no level of its own
    return require("coremltools", extra="coreml", purpose=purpose)
