"""The garden's trained weights: in a checkout, train/assets; installed, the distribution kdc-edge-garden (13 MB).

The wheel for devices goes without them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from kdc_edge.errors import require

PACKAGE = "kdc_edge_garden"  # train/assets/pyproject.toml


def _home() -> Path:
    checkout = Path(__file__).parents[1] / "assets"
    spec = None if checkout.is_dir() else importlib.util.find_spec(PACKAGE)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else checkout


ASSETS = _home()
GARDEN_TEACHER = ASSETS / "garden-teacher"
JUDGE = ASSETS / "judge" / "judge.safetensors"


def need_garden(purpose: str) -> None:
    """Raise MissingPackageError unless the weights are there."""
    if not ASSETS.is_dir():
        require(PACKAGE, extra="garden", purpose=purpose)


def where_it_is(folder: Path) -> Path:
    """This installation's teacher where a saved run names that of another one, which is not here."""
    of_garden = folder.name == GARDEN_TEACHER.name and folder.parent.name in ("assets", PACKAGE)
    return GARDEN_TEACHER if of_garden and not folder.is_dir() else folder
