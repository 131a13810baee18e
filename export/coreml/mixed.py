"""Mixed-bit palettization: each layer of the U-Net gets as few bits as it can bear, within a budget.

    search = Search(unet, package, calibration, Path("bundles/.coreml-search-1f2e"), tell)
    recipe = search.find(Budget(max_size_bytes=300_000_000))       # layer by layer 1, 2, 4, 6 or 8 bits
    package = apply_recipe(package, recipe)

First every layer alone is damaged with the tables of 1, 2, 4, 6 and 8 bits that coremltools would store, and the
error of the guided prediction on calibration inputs is measured (guidance multiplies the errors in what the text
does, which the plain prediction hides). Then, from 8 bits everywhere, the step that saves the most bytes
for the least added error is taken again and again (each layer along the convex hull of its choices), until the
budget is met; the whole recipe is then measured at once. Layers are matched by name. All that is slow is written
to the folder as it is found, so an interrupted search goes on, and another budget needs seconds.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from kdc_edge.errors import InputError
from kdc_edge.export.calibration import Calibration
from kdc_edge.export.coreml.palettize import MIN_WEIGHTS, folder_bytes, palettize
from kdc_edge.files import read_json
from kdc_edge.guidance import guided
from kdc_edge.manifest import Recipe
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.apple_layout import PROGRAM
from kdc_edge.runtimes.mil.evaluator import Evaluator
from kdc_edge.runtimes.mil.program import read_program
from kdc_edge.text import invalid_field

BITS = (8, 6, 4, 2, 1)
ENTRY_BYTES = 192  # a table's and its indices' own metadata and alignment in a package

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """The limit of the search: exactly one of the two."""

    max_size_bytes: int | None = None  # of the U-Net's package
    min_psnr_db: float | None = None  # of the guided prediction on the calibration inputs

    def __post_init__(self) -> None:
        if (self.max_size_bytes is None) == (self.min_psnr_db is None):
            raise InputError(
                "--precision mixed needs one budget: give --max-size 300MB or --min-psnr 30, or a --recipe"
            )


@dataclass(frozen=True)
class Step:
    """One layer goes down to fewer bits."""

    layer: str
    bits: int
    saved_bytes: int
    added_error: float


class Search:
    """Damage by layer and bits, kept in a folder."""

    def __init__(
        self,
        unet: nn.Module,
        package: Any,
        calibration: Calibration,
        folder: Path,
        tell: Tell,
    ) -> None:
        self.folder = folder
        self._unet = unet
        self._package = package
        self._tell = tell
        self._inputs = _together(calibration.inputs)
        both = len(calibration.inputs[0]["sample"]) > 1  # halves of classifier-free guidance
        self._guidance = calibration.info.guidance if both else 1.0
        self._weights = {f"unet_{name.replace('.', '_')}": p for name, p in unet.named_parameters()}
        folder.mkdir(parents=True, exist_ok=True)
        self._tables = {bits: self._palettize(bits) for bits in BITS}
        self.layers = self._find_layers()  # constant's name -> number of weights
        with torch.no_grad():
            self._originals = {name: self._weight(name).clone() for name in self.layers}
            self._expected = self._compute()
        self._rest_bytes = folder_bytes(folder / "palette8.mlpackage") - sum(
            stored_bytes(size, 8) for size in self.layers.values()
        )

    def find(self, budget: Budget) -> Recipe:
        """The recipe for a budget. Raises InputError where there is none, saying what can be had."""
        steps = self.steps()
        if budget.max_size_bytes is not None:
            taken = self.until_size(steps, budget.max_size_bytes)
        else:
            assert budget.min_psnr_db is not None
            taken = self._while_psnr(steps, budget.min_psnr_db)
        bits = self.bits_after(steps[:taken])
        return Recipe(bits=bits, size_bytes=self.size_bytes(bits), psnr_db=round(self.psnr_db(bits), 2))

    def steps(self) -> list[Step]:
        """From 8 bits everywhere down to the least, the best bargain first."""
        damage = self.damage()
        found = [step for layer, size in self.layers.items() for step in bargains(layer, size, damage[layer])]
        return sorted(found, key=lambda s: s.added_error / s.saved_bytes)

    def damage(self) -> dict[str, dict[int, float]]:
        """layer -> bits -> mean square error over the squared peak, only that layer having so few bits."""
        path = self.folder / "damage.jsonl"
        found: dict[str, dict[int, float]] = {layer: {} for layer in self.layers}
        before = path.read_text("utf-8") if path.is_file() else ""
        for line in before.splitlines():
            try:
                layer, bits, error = json.loads(line)
            except ValueError:
                continue  # the last line of a search that was cut off
            if layer in found:
                found[layer][bits] = error
        missing = [(layer, bits) for layer in self.layers for bits in BITS if bits not in found[layer]]
        with path.open("a", encoding="utf-8") as file:
            file.write("" if before.endswith("\n") or not before else "\n")
            for number, (layer, bits) in enumerate(missing):
                found[layer][bits] = self._error({layer: bits})
                file.write(json.dumps([layer, bits, found[layer][bits]]) + "\n")
                file.flush()
                if number % 100 == 0:
                    self._tell(f"measured {number} of {len(missing)} choices")
        return found

    def bits_after(self, steps: Sequence[Step]) -> dict[str, int]:
        return dict.fromkeys(self.layers, BITS[0]) | {step.layer: step.bits for step in steps}

    def size_bytes(self, bits: Mapping[str, int]) -> int:
        """Of the U-Net's package, to a few kilobytes."""
        return self._rest_bytes + sum(stored_bytes(size, bits[layer]) for layer, size in self.layers.items())

    def psnr_db(self, bits: Mapping[str, int]) -> float:
        """Of the guided prediction on the calibration inputs, all layers at once."""
        return -10 * math.log10(max(self._error(bits), 1e-30))

    def set_weights(self, bits: Mapping[str, int]) -> None:
        """Give layers of the PyTorch U-Net the weights that the package would store."""
        with torch.no_grad():
            for layer, n in bits.items():
                weight = self._weight(layer)
                stored = self._tables[n].constant(f"{layer}_palettized").astype(np.float32)
                weight.copy_(torch.from_numpy(stored).reshape(weight.shape))

    def restore(self, layers: Iterator[str] | Sequence[str]) -> None:
        with torch.no_grad():
            for layer in layers:
                self._weight(layer).copy_(self._originals[layer])

    def _error(self, bits: Mapping[str, int]) -> float:
        self.set_weights(bits)
        with torch.no_grad():
            found = self._compute()
        self.restore(list(bits))
        error = float((found - self._expected).double().square().mean() / self._expected.double().abs().max() ** 2)
        return error if math.isfinite(error) else math.inf

    def _compute(self) -> torch.Tensor:
        both = torch.cat([self._unet(**call, return_dict=False)[0] for call in self._inputs])  # (2N, C, h, w)
        if self._guidance <= 1:  # (N, C, h, w): there are no halves
            return both
        noise_pred: torch.Tensor = guided(both[::2], both[1::2], self._guidance)
        return noise_pred

    def _weight(self, layer: str) -> nn.Parameter:
        return self._weights[layer.removesuffix("_to_fp16")]

    def _palettize(self, bits: int) -> Evaluator:
        """The whole U-Net with tables of so many bits; only the first time takes time."""
        path = self.folder / f"palette{bits}.mlpackage"
        if not path.is_dir():
            self._tell(f"finding tables of {bits} bits")
            part = path.with_name(f".part-{path.name}")
            shutil.rmtree(part, ignore_errors=True)
            with quiet():
                palettize(self._package, bits).save(str(part))
            part.replace(path)
        return Evaluator(read_program(path / PROGRAM))

    def _find_layers(self) -> dict[str, int]:
        """The weights that coremltools palettized and PyTorch knows by name; the rest stays at 8 bits."""
        names = [
            name.removesuffix("_palettized")
            for name, value in self._tables[8].constants()
            if value.type == "constexpr_lut_to_dense"
        ]
        known = [n for n in names if n.removesuffix("_to_fp16") in self._weights and self._weight(n).ndim > 1]
        return {name: self._weight(name).numel() for name in known}

    def until_size(self, steps: Sequence[Step], max_size_bytes: int) -> int:
        """How many steps a size takes."""
        size = self.size_bytes(self.bits_after([]))
        for taken, step in enumerate(steps):
            if size <= max_size_bytes:
                return taken
            size -= step.saved_bytes
        if size > max_size_bytes:
            raise InputError(
                f"--max-size {max_size_bytes / 1e6:g}MB is below {size / 1e6:.4g} MB, the least at 1 bit a weight"
            )
        return len(steps)

    def _while_psnr(self, steps: Sequence[Step], min_psnr_db: float) -> int:
        """The most steps whose measured PSNR holds, by bisection."""
        best = self.psnr_db(self.bits_after([]))
        if best < min_psnr_db:
            raise InputError(
                f"--min-psnr {min_psnr_db:g} is above {best:.1f} dB, the PSNR of 8 bits per weight: use w8 or fp16"
            )
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high + 1) // 2
            if self.psnr_db(self.bits_after(steps[:middle])) >= min_psnr_db:
                low = middle
            else:
                high = middle - 1
        return low


def bargains(layer: str, size: int, damage: Mapping[int, float]) -> list[Step]:
    """A layer's steps down, along the lower convex hull of (bytes, error): each worse a bargain than the last."""
    stored, error, bits = stored_bytes(size, BITS[0]), damage[BITS[0]], BITS[0]
    found: list[Step] = []
    while bits != BITS[-1]:
        below = [(max(damage[b] - error, 0.0), stored_bytes(size, b), b) for b in BITS if b < bits]
        added, smaller, fewer = min(below, key=lambda point: (point[0] / (stored - point[1]), point[1]))
        found.append(Step(layer, fewer, stored - smaller, added))
        stored, error, bits = smaller, error + added, fewer
    return found


def stored_bytes(size: int, bits: int) -> int:
    """Of a layer in a package: packed indices, and the table in fp16."""
    return -(-size * bits // 8) + 2 * (1 << bits) + ENTRY_BYTES


def apply_recipe(package: Any, recipe: Recipe) -> Any:
    """The fp16 package with the recipe's bits. Raises InputError where a layer of the recipe is not there."""
    import coremltools.optimize.coreml as cto

    weights = set(cto.get_weights_metadata(package, weight_threshold=MIN_WEIGHTS))
    unknown = sorted(recipe.bits.keys() - weights)
    if unknown:
        raise InputError(f"the recipe names the layer {unknown[0]!r}, which this U-Net does not have: make a new one")
    with quiet():
        return palettize(package, 8, recipe.bits)


def _together(inputs: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, torch.Tensor]]:
    """Calls of the U-Net, each (cond, uncond), in fewer and larger ones, a timestep a sample."""
    calls = [call | {"timestep": call["timestep"].repeat(len(call["sample"]))} for call in map(dict, inputs)]
    return [
        {name: torch.from_numpy(np.concatenate([call[name] for call in calls[i : i + 4]])) for name in calls[0]}
        for i in range(0, len(calls), 4)
    ]


def read_recipe(path: Path) -> Recipe:
    """From a JSON file: a recipe, or the manifest of a bundle that was made by one. Raises InputError."""
    found = read_json(path, InputError)
    try:
        return Recipe.model_validate(found.get("recipe", found))
    except ValidationError as error:
        raise InputError(
            f"{path} holds no recipe: {invalid_field(error)}; give the kdc-edge.json of a mixed bundle"
        ) from None
