"""Settings: a configuration class declares each one once; flags, TOML keys, checks, files and tables are made from it.

    @dataclass(frozen=True)
    class TrainConfig(Settings):
        steps: int = setting(300, "Steps of each task.", "Optimization", ge=1)

    TrainConfig(steps=0, ...)               # InputError: --steps 0 is too few: use 1 or more
    [s.option for s in settings_of(TrainConfig)]

A field's metadata has pydantic's names, so that pydantic checks a saved document against the same declaration. It is
imported for that alone: the command line declares its flags without it.
"""

from __future__ import annotations

import json
import math
import operator
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from kdc_edge.errors import InputError, unknown_choice
from kdc_edge.text import invalid_field

BOUNDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}


def setting(
    default: Any, help: str, group: str, *, option: str | None = None, free: bool = False, **bounds: float
) -> Any:
    """A field with its help, its group in --help and its bounds (ge, gt, le, lt); a default of MISSING requires it.

    `option` names the flag where the field's name is not enough; `free` settings may change when a run is resumed.
    """
    about = {"description": help, "group": group, "option": option, "free": free}
    return field(default=default, metadata=about | bounds)


@dataclass(frozen=True)
class Setting:
    """One setting of a configuration class; `name` is unique among the class's settings and those of its parts."""

    name: str  # weight_task: the flag --weight-task, the key weight-task
    path: tuple[str, ...]  # ("loss", "task"): the attribute loss.task
    kind: Any  # the annotation
    default: Any
    help: str
    group: str
    free: bool
    bounds: Mapping[str, float]

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def range(self) -> str:
        """The bounds in words: "1 or more", "0 to below 1"; empty where there are none."""
        words = {"ge": "{}", "gt": "above {}", "le": "{}", "lt": "below {}"}
        ends = [words[kind].format(bound) for kind, bound in self.bounds.items()]
        return f"{ends[0]} or more" if list(self.bounds) == ["ge"] else " to ".join(ends)

    def of(self, config: Settings) -> Any:
        """Its value in a configuration."""
        return operator.attrgetter(".".join(self.path))(config)

    def check(self, value: Any) -> None:
        """Refuse a value out of bounds, NaN, infinity and an unknown choice: InputError, one line."""
        if self.choices and value not in self.choices:
            raise unknown_choice(self.option, value, self.choices)
        if not isinstance(value, int | float):
            return
        if not (math.isfinite(value) and all(BOUNDS[kind](value, bound) for kind, bound in self.bounds.items())):
            few = list(self.bounds) == ["ge"] and value < self.bounds["ge"]
            wrong = f"too {'few' if isinstance(value, int) else 'small'}" if few else "out of range"
            raise InputError(f"{self.option} {value} is {wrong}: use {self.range or 'a finite number'}")


class Settings:
    """The base of configuration classes, which are frozen dataclasses; a part may be another such class."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    def __post_init__(self) -> None:
        for s in settings_of(type(self)):
            s.check(s.of(self))

    @classmethod
    def from_json(cls, document: object) -> Self:
        """The configuration that `as_json` wrote; raises InputError, which names the field."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_python(document)
        except ValidationError as error:
            raise InputError(invalid_field(error)) from None

    def as_json(self) -> dict[str, object]:
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[call-overload,no-any-return]

    def as_flags(self) -> str:
        """The flags that make this configuration: every setting that differs from its default."""
        words: list[str] = []
        for s, value in ((s, s.of(self)) for s in settings_of(type(self)) if s.of(self) != s.default):
            no = s.option.replace("--", "--no-", 1)
            words += [s.option, str(value)] if not isinstance(value, bool) else [s.option if value else no]
        return shlex.join(words)

    def table(self) -> list[tuple[str, str, str]]:
        """(group, flag, value) of every setting that has a value and is not free; paths by name."""
        found = [(s, s.of(self)) for s in settings_of(type(self)) if not s.free]
        return [(s.group, f"`{s.option}`", str(getattr(v, "name", v))) for s, v in found if v is not None]


def settings_of(kind: type[Settings]) -> tuple[Setting, ...]:
    """Every setting of a class and of its parts, in the order of their declaration."""
    hints, found = get_type_hints(kind), []
    for f in fields(kind):  # type: ignore[arg-type]
        hint, about = hints[f.name], f.metadata
        if isinstance(hint, type) and issubclass(hint, Settings):
            found += [replace(s, path=(f.name, *s.path)) for s in settings_of(hint)]
        elif "description" in about:
            name, bounds = about["option"] or f.name, {name: about[name] for name in BOUNDS if name in about}
            words = about["description"], about["group"], about["free"]
            found.append(Setting(name, (f.name,), hint, f.default, *words, bounds))
    return tuple(found)


def arguments(config: Settings | type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by a setting's name as arguments of the class, or of `replace`; parts keep what `values` lacks."""
    found: dict[str, Any] = {}
    for s in settings_of(config if isinstance(config, type) else type(config)):
        if s.name in values and len(s.path) == 1:
            found[s.path[0]] = values[s.name]
        elif s.name in values and s.path[0] not in found:
            part = getattr(config, s.path[0])  # of a class: the default
            found[s.path[0]] = replace(part, **arguments(part, values))
    return found
