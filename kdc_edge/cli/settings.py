"""The flags of a configuration class: a command's parameter `given` becomes one option a setting.

@flags(TrainConfig, teacher="garden")                    # with other defaults than the fields', where it names any
def train(given: Given[TrainConfig], out: ...) -> None:
    config = given.make(tasks=...)
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, replace
from typing import Annotated, Any, Generic, TypeVar

import typer

from kdc_edge.settings import Setting, Settings, arguments, settings_of

T = TypeVar("T", bound=Settings)


@dataclass(frozen=True)
class Given(Generic[T]):
    """What the command line and kdc-edge.toml say of a configuration class."""

    kind: type[T]
    values: dict[str, Any]  # by the setting's name
    typed: frozenset[str]  # names of the command's parameters that were given by hand
    named: frozenset[str]  # those, and the keys of the settings file

    def make(self, **others: Any) -> T:
        """A new configuration; `others` are the fields that have no flag here."""
        return self.kind(**arguments(self.kind, self.values), **others)

    def under(self, defaults: Mapping[str, Any]) -> Given[T]:
        """With other defaults: values for settings that were not named, which count as given by hand from here on."""
        new = {name: value for name, value in defaults.items() if name not in self.named}
        return replace(self, values=self.values | new, typed=self.typed | new.keys(), named=self.named | new.keys())

    def change(self, config: T, **others: Any) -> T:
        """A configuration with the values that were given by hand."""
        typed = {name: value for name, value in self.values.items() if name in self.typed}
        return replace(config, **arguments(config, typed), **others)  # type: ignore[type-var]


def flags(kind: type[Settings], *names: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of these settings, or of all; its parameter `given` receives them."""
    chosen = [s for s in settings_of(kind) if not names or s.name in names]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(context: typer.Context, **values: Any) -> None:
            sources = {name: context.get_parameter_source(name) for name in values}
            typed = frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")
            named = typed | {name for name, source in sources.items() if source and source.name == "DEFAULT_MAP"}
            given = Given(kind, {s.name: values.pop(s.name) for s in chosen}, typed, named)
            command(given=given, **values)

        signature = inspect.signature(command, eval_str=True)
        own = [p for name, p in signature.parameters.items() if name != "given"]
        made = [_parameter("context", typer.Context), *(_option(s, defaults) for s in chosen), *own]
        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in made]
        )
        return wrapper

    return decorate


def _option(s: Setting, defaults: dict[str, Any]) -> inspect.Parameter:
    """Choices and bounds are shown here and checked by the class, in one line and for TOML keys alike."""
    default = defaults.get(s.name, s.default)
    words = f"{s.help.rstrip('.')} ({s.range})." if s.range else s.help
    # typer adds --no-NAME to every switch: a run that goes on may turn off what it was started with
    about = typer.Option(help=words, rich_help_panel=s.group, metavar="|".join(s.choices) or None)
    return _parameter(s.name, Annotated[str if s.choices else s.kind, about], default)


def _parameter(name: str, annotation: Any, default: Any = MISSING) -> inspect.Parameter:
    found = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    return found if default is MISSING else found.replace(default=default)
