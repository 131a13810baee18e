"""Training objectives by name: one file and one row each. The contract is in train/objective.py."""

from __future__ import annotations

from collections.abc import Callable

from kdc_edge.errors import InputError
from kdc_edge.train.objective import Objective, Setup
from kdc_edge.train.objectives.distillation import Distillation

Factory = Callable[[Setup], Objective]

OBJECTIVES: dict[str, Factory] = {
    "distillation": Distillation,
}


def find_objective(name: str) -> Factory:
    """The factory of an objective by name; raises InputError naming what there is."""
    if name not in OBJECTIVES:
        raise InputError(f"unknown objective {name!r}: choose from {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
