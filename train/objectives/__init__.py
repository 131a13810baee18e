"""Training objectives by name: one file and one row each. The contract is in train/objective.py."""

from __future__ import annotations

from collections.abc import Callable

from kdc_edge.errors import unknown_choice
from kdc_edge.train.objective import Objective, Setup
from kdc_edge.train.objectives.distillation import Distillation
from kdc_edge.train.objectives.phased import Phased

Factory = Callable[[Setup], Objective]

OBJECTIVES: dict[str, Factory] = {
    "distillation": Distillation,
    "phased": Phased,
}


def find_objective(name: str) -> Factory:
    """The objective of this name; raises InputError, as for an unknown choice."""
    if name not in OBJECTIVES:
        raise unknown_choice("--objective", name, tuple(OBJECTIVES))
    return OBJECTIVES[name]
