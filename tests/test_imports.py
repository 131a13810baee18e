"""No circle of imports between our modules, counting imports inside functions and those for type checkers alone."""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kdc_edge

ROOT = Path(__file__).parents[1]
Graph = dict[str, set[str]]  # module -> the modules that it imports


def modules(folder: Path, name: str) -> dict[str, Path]:
    """Every module of a package by its full name, rooms behind links too."""
    found = {name: folder / "__init__.py"}
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").is_file():
            found |= modules(path, f"{name}.{path.name}")
        elif path.suffix == ".py" and path.stem != "__init__":
            found[f"{name}.{path.stem}"] = path
    return found


def imports(source: str, known: set[str]) -> set[str]:
    """The known modules that a source names anywhere; `from package import module` names the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= submodules or {node.module}
            if len(submodules) < len(node.names):
                found.add(node.module)
    return found & known


def circles(graph: Graph) -> list[list[str]]:
    """A circle of modules, each importing the one after it; one a run of the search, its last link taken out."""
    graph, found = {name: set(others) for name, others in graph.items()}, []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1][::-1]  # each before the module that it imports
            found.append(circle)
            graph[circle[0]].discard(circle[1])
        else:
            return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    paths = modules(Path(kdc_edge.__file__).parent, "kdc_edge")
    assert {"kdc_edge.train.loop", "kdc_edge.runtimes.base", "kdc_edge.export.parity"} <= paths.keys()
    graph = {name: imports(path.read_text("utf-8"), set(paths)) - {name} for name, path in paths.items()}
    assert not [" -> ".join(circle) for circle in circles(graph)]


@pytest.mark.parametrize(
    "source",
    [
        "import p.b",
        "from p import b",
        "def f():\n    from p.b import g",
        "if TYPE_CHECKING:\n    from p.b import G",
    ],
)
def test_a_circle_is_seen_however_it_is_imported(source: str) -> None:
    known = {"p", "p.a", "p.b"}
    graph = {"p": set(), "p.a": imports(source, known), "p.b": imports("from p.a import h", known)}
    assert [set(circle) for circle in circles(graph)] == [{"p.a", "p.b"}]
    assert circles({**graph, "p.b": set()}) == []


def test_the_contract_of_the_device_path_names_every_module_of_it() -> None:
    """What is new in a room of the device path may not import PyTorch either; cli imports inside its commands."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (contract,) = (
        c for c in settings["tool"]["importlinter"]["contracts"] if "torch" in c.get("forbidden_modules", [])
    )
    rooms = {
        ".".join(name.split(".")[: 3 if name.startswith("kdc_edge.runtimes") else 2])
        for name in modules(ROOT / "kdc_edge", "kdc_edge")
    }
    others = {"", ".__main__", ".cli", ".checkpoints", ".export", ".train", ".runtimes", ".runtimes.torch"}
    assert sorted(rooms - {f"kdc_edge{name}" for name in others}) == sorted(contract["source_modules"])
