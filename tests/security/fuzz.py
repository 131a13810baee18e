"""Damaged inputs of every kind that is read, by the thousand: each is taken, or refused in one line.

    KDC_EDGE_FUZZ=10000 python -m pytest -m security tests/security/test_fuzz.py

A case is a seed and a number: `Fuzzer(targets, seed).one(number)` repeats it alone.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdc_edge.cli import _outcome

MAX_SECONDS, MAX_RSS_BYTES = 20.0, 2**30  # of one input; and of what all of them may add
NASTY: tuple[Any, ...] = (
    None, True, "", -1, 0, 1, 2**31, 2**64, -(2**63), 1e308, float("nan"), float("inf"), "x", "../x", "/etc/passwd",
    "\x1b[31m", "\u202e", "\x00", "\n", "a" * 5000, "é" * 300, [], {}, [[]], [None], [1, 2], {"a": {"b": []}}, "=1+1",
    "%s%n", "1" * 4000,
)  # fmt: skip


def mutate_bytes(data: bytes, rng: random.Random, *, head: int | None = None) -> bytes:
    """Bits flipped, ranges cut, doubled, zeroed or made random; within the first `head` bytes where it is given."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = min(head or len(found), len(found)) or 1
        at, length = rng.randrange(end), rng.choice((1, 1, 4, 8, 64, 1000))
        action = rng.randrange(6)
        if action == 0 and found:
            found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
        elif action == 1:
            del found[at : at + length]
        elif action == 2:
            found[at:at] = found[at : at + length]
        elif action == 3:
            found[at : at + length] = bytes(len(found[at : at + length]))
        elif action == 4:
            found[at : at + length] = rng.randbytes(len(found[at : at + length]))
        else:
            del found[at:]
    return bytes(found)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """One to three places of the document replaced, removed, renamed, nested or doubled; now and then raw bytes."""
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    document = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        node, last = _place(document, rng)
        if node is None:
            return json.dumps(rng.choice(NASTY)).encode()
        action = rng.randrange(5)
        if action == 0:
            node[last] = copy.deepcopy(rng.choice(NASTY))
        elif action == 1:
            del node[last]
        elif action == 2 and isinstance(node, dict):
            node[str(rng.choice(NASTY))] = node.pop(last)
        elif action == 3:
            for _ in range(rng.choice((1, 50, 5000))):
                node[last] = [node[last]]
            break  # what is so deep cannot be walked again
        else:
            node[last] = [copy.deepcopy(node[last])] * rng.choice((2, 100))
    try:
        return json.dumps(document).encode()
    except RecursionError:
        return b"[" * 100_000


def _place(document: Any, rng: random.Random) -> tuple[Any, Any]:
    """A random container of the document, and a key that it has."""
    places = []

    def walk(node: Any, depth: int) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in items:
            places.append((node, key))
            if depth < 20 and len(places) < 2000:
                walk(inner, depth + 1)

    walk(document, 0)
    return rng.choice(places) if places else (None, None)


@dataclass(frozen=True)
class Target:
    """A file that is damaged, and what reads it. `refused`: anything but the original has to be refused."""

    name: str
    path: Path
    read: Callable[[], object]
    mutate: Callable[[bytes, random.Random], bytes] = mutate_bytes
    refused: bool = False
    allowed: tuple[type[Exception], ...] = ()  # besides a KdcError


@dataclass
class Fuzzer:
    targets: Sequence[Target]
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest_sec: float = 0.0

    def one(self, number: int) -> None:
        target = self.targets[number % len(self.targets)]
        rng = random.Random(f"{self.seed} {number}")
        original = target.path.read_bytes()
        damaged = target.mutate(original, rng)
        begin = time.monotonic()
        try:
            target.path.write_bytes(damaged)
            target.read()
        except target.allowed:
            self.counts[f"{target.name}: refused"] += 1
        except Exception as error:
            self.counts[f"{target.name}: refused"] += 1
            self._judge(f"{target.name} {number}", error)
        else:
            self.counts[f"{target.name}: taken"] += 1
            if target.refused and damaged != original:
                self.faults.append(f"{target.name} {number}: a silent change")
        finally:
            target.path.write_bytes(original)
        seconds = time.monotonic() - begin
        self.slowest_sec = max(self.slowest_sec, seconds)
        if seconds > MAX_SECONDS:
            self.faults.append(f"{target.name} {number}: {seconds:.1f} s")

    def _judge(self, case: str, error: Exception) -> None:
        code, line = _outcome(error)
        if code not in (1, 2) or line is None or "please report it" in line:
            self.faults.append(f"{case}: {type(error).__name__}: {str(error)[:200]!r}")
        elif not line.isprintable() or len(line) > 490:
            self.faults.append(f"{case}: not one printable line: {line[:200]!r}")

    def run(self, count: int) -> dict[str, Any]:
        """The figures: how many of each kind, what was wrong, the slowest, and what memory they added."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.monotonic()
        for number in range(count):
            self.one(number)
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if added > MAX_RSS_BYTES:
            self.faults.append(f"{added / 2**20:.0f} MiB more memory")
        return {
            "seed": self.seed, "inputs": count, "seconds": round(time.monotonic() - begin, 1), "faults": self.faults,
            "slowest_sec": round(self.slowest_sec, 2), "added_mib": round(added / 2**20),
            **dict(sorted(self.counts.items())),
        }  # fmt: skip
