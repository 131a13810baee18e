"""Examples in docstrings hold: doctests pass, and the calls in module docstrings fit the code's signatures."""

from __future__ import annotations

import ast
import builtins
import collections.abc
import doctest
import importlib
import inspect
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"export": "kdc_edge.export", "runtimes": "kdc_edge.runtimes", "train": "kdc_edge.train"}
FOREIGN = {"Path", "partial", "replace", "Console", "UNet2DConditionModel", "unet"}  # not ours, or given


def module_names() -> list[str]:
    found = []
    for top, package in {"kdc_edge": "kdc_edge", **ROOMS}.items():
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT / top).with_suffix("").parts
            if not any(parent.is_symlink() for parent in path.parents):
                found.append(".".join([package, *(p for p in parts if p != "__init__")]))
    return found


MODULES = module_names()


@cache
def public_names() -> dict[str, object]:
    """What the modules define, by name: an example may show a neighbour's function."""
    found: dict[str, object] = {}
    for name in MODULES:
        for key, value in vars(importlib.import_module(name)).items():
            if getattr(value, "__module__", None) == name and not key.startswith("_"):
                found.setdefault(key, value)
    return found


@dataclass(frozen=True)
class Instance:
    """Some object of a class."""

    of: type


UNKNOWN = object()


class Examples:
    """The faults in the code that one module's docstring shows."""

    def __init__(self, module: ModuleType) -> None:
        self.names: dict[str, object] = {**public_names(), **vars(module), **dict.fromkeys(FOREIGN, UNKNOWN)}
        self.faults: list[str] = []
        for code in self._code(inspect.getdoc(module) or ""):
            for node in code.body:
                self._statement(node)

    @staticmethod
    def _code(text: str) -> Iterator[ast.Module]:
        for paragraph in text.split("\n\n")[1:]:
            if ">>>" in paragraph:
                continue  # a doctest
            try:
                yield ast.parse(textwrap.dedent(paragraph))
            except SyntaxError:  # prose, or both mixed
                for line in paragraph.splitlines():
                    try:
                        yield ast.parse(line.strip())
                    except SyntaxError:
                        continue

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            self._bind(node.targets[0], self._value(node.value))
        elif isinstance(node, ast.For):
            found = self._value(node.iter)
            items = typing.get_args(found) if _is_iterable(found) else ()
            self._bind(node.target, _instance(items[0]) if items else UNKNOWN)
            for inner in node.body:
                self._statement(inner)
        elif isinstance(node, ast.With):
            for item in node.items:
                self._value(item.context_expr)
                if item.optional_vars is not None:
                    self._bind(item.optional_vars, UNKNOWN)
            for inner in node.body:
                self._statement(inner)
        elif isinstance(node, ast.Expr):
            for element in node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]:
                self._value(element)

    def _bind(self, target: ast.expr, value: object) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Tuple):
            parts = typing.get_args(value) if typing.get_origin(value) is tuple else ()
            if parts and Ellipsis not in parts and len(parts) != len(target.elts):
                self.faults.append(f"{ast.unparse(target)}: {len(parts)} values come back")
            for element in target.elts:
                self._bind(element, UNKNOWN)

    def _value(self, node: ast.expr) -> object:
        """What the expression stands for, as far as annotations tell; faults on the way are noted."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, UNKNOWN)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, self._value(node.value))
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else None
            if name is not None and name not in self.names and not hasattr(builtins, name):
                self.faults.append(f"{ast.unparse(node)}: there is no {name}")
            function = self._value(node.func)
            for argument in (*node.args, *(k.value for k in node.keywords)):
                self._value(argument)
            return self._call(node, function)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._value(child)
        return UNKNOWN

    def _attribute(self, node: ast.Attribute, base: object) -> object:
        if isinstance(base, Instance) and base.of.__module__.startswith("kdc_edge"):
            if not hasattr(base.of, node.attr):
                known = any(node.attr in getattr(c, "__annotations__", {}) for c in base.of.__mro__)
                if not known and f"self.{node.attr} " not in inspect.getsource(base.of).replace(":", " "):
                    self.faults.append(f"{ast.unparse(node)}: {base.of.__name__} has no {node.attr}")
                    return UNKNOWN
                hints = typing.get_type_hints(base.of) if known else {}
                return _instance(hints.get(node.attr))
            found = inspect.getattr_static(base.of, node.attr)
            if isinstance(found, property):
                return _instance(typing.get_type_hints(found.fget).get("return"))
            bound = getattr(base.of, node.attr)
            return _Method(bound) if inspect.isfunction(found) else bound
        if inspect.isclass(base) and base.__module__.startswith("kdc_edge"):
            return getattr(base, node.attr, UNKNOWN)
        return UNKNOWN

    def _call(self, node: ast.Call, function: object) -> object:
        if isinstance(function, Instance) and hasattr(function.of, "__call__"):  # noqa: B004
            function = _Method(function.of.__call__)
        self_argument = [None] if isinstance(function, _Method) else []
        target: Any = function.function if isinstance(function, _Method) else function
        if not callable(target) or not getattr(target, "__module__", "").startswith("kdc_edge"):
            return UNKNOWN
        partly = any(isinstance(a, ast.Starred) or _is_dots(a) for a in node.args) or None in [
            k.arg for k in node.keywords
        ]
        signature = inspect.signature(target)
        bind = signature.bind_partial if partly else signature.bind
        values = [a for a in node.args if not isinstance(a, ast.Starred) and not _is_dots(a)]
        try:
            bind(*self_argument, *values, **{k.arg: k.value for k in node.keywords if k.arg})
        except TypeError as error:
            self.faults.append(f"{ast.unparse(node)}: {error}")
        if inspect.isclass(target):
            return Instance(target)
        try:
            return _instance(typing.get_type_hints(target).get("return"))
        except NameError:  # a name for type checkers alone
            return UNKNOWN


@dataclass(frozen=True)
class _Method:
    function: Any


def _instance(hint: object) -> object:
    return Instance(hint) if inspect.isclass(hint) and typing.get_origin(hint) is None else hint or UNKNOWN


def _is_iterable(hint: object) -> bool:
    origin = typing.get_origin(hint)
    return inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable)


def _is_dots(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


@pytest.mark.parametrize("name", MODULES)
def test_the_calls_in_a_modules_docstring_fit(name: str) -> None:
    assert Examples(importlib.import_module(name)).faults == []


def test_faults_are_found() -> None:
    module = ModuleType("example")
    module.__doc__ = """An example.

        buffer = ReplayBuffer(capacity=500)
        buffer.limit(8)
        buffer.colour
        for prompt, seed, size in prompts_and_seeds(prompts, images, seeds): ...
        gone(3)

    Prose (in brackets) is no code.
    """
    faults = Examples(module).faults
    assert [fault.split(":")[0] for fault in faults] == [
        "buffer.limit(8)", "buffer.colour", "(prompt, seed, size)", "gone(3)",
    ]  # fmt: skip


def test_doctests_pass() -> None:
    names = [name for name in MODULES if ">>> " in inspect.getsource(importlib.import_module(name))]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert all(result.attempted and not result.failed for result in results.values()), results
    assert len(names) >= 5
