"""Training objectives by name: one file and one row each. The contract is in train/objective.py."""

from __future__ import annotations

from collections.abc import Callable

from kdc_edge.errors import InputError
from kdc_edge.train.objective import Objective, Setup
from kdc_edge.train.objectives.distillation import Distillation

OBJECTIVES: dict[str, Callable[[Setup], Objective]] = {
    "distillation": Distillation,
}


def make_objective(name: str, setup: Setup) -> Objective:
    """The objective of this name for a run; raises InputError naming what there is."""
    if name not in OBJECTIVES:
        raise InputError(f"unknown objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](setup)
