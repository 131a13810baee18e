"""Training objectives by name: one file and one row each. The contract is in train/objective.py."""

from __future__ import annotations

from kdc_edge.errors import unknown_choice
from kdc_edge.train.objective import Objective
from kdc_edge.train.objectives.distillation import Distillation
from kdc_edge.train.objectives.distribution import Distribution
from kdc_edge.train.objectives.phased import Phased

OBJECTIVES: dict[str, type[Objective]] = {
    "distillation": Distillation,
    "phased": Phased,
    "distribution": Distribution,
}


def find_objective(name: str) -> type[Objective]:
    """The objective of this name; raises InputError, as for an unknown choice."""
    if name not in OBJECTIVES:
        raise unknown_choice("--objective", name, tuple(OBJECTIVES))
    return OBJECTIVES[name]
