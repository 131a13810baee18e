"""The weight files of a network: which are loaded, and what their headers say. No weight is read.

weights_of(Path("checkpoint/unet")).files       # model.fp16.safetensors, where there is no other
read_shapes(path)                               # {"conv_in.weight": [320, 4, 3, 3], ...}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdc_edge.errors import CheckpointError
from kdc_edge.files import read_json
from kdc_edge.text import one_line, printable

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
MAX_HEADER_BYTES = 16 * 2**20  # the teacher's U-Net has 686 tensors in 80 kB
MAX_DIMENSIONS = 8
BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class Weights:
    """The weight files of a network that are loaded: one, or those of an index; and those that are not."""

    files: tuple[Path, ...]
    index: Path | None = None
    variant: str | None = None  # diffusers' word for the part of a file's name, such as fp16
    others: tuple[str, ...] = ()  # the first files of other variants

    @property
    def note(self) -> str | None:
        """A line for people where the choice was not plain."""
        if not self.files or (self.variant is None and not self.others):
            return None
        rest = f", not {', '.join(self.others)}" if self.others else ""
        taken = self.index or self.files[0]
        return f"{taken.parent.name}: weights of {taken.name}{rest}"


def weights_of(network: Path, kind: str | None = None) -> Weights:
    """The safetensors files of a network's folder: those without a variant, else fp16, bf16, or another one.

    Where a variant has one file and an index, diffusers takes the index and transformers the file. `kind` is the
    network's name where the folder has another one. Raises CheckpointError for an index that leads nowhere.
    """
    kind = kind or network.name
    stem = WEIGHTS[kind].removesuffix(".safetensors")
    found: dict[str | None, Path] = {}
    single = {_variant(rf"{stem}(?:\.(\w+))?\.safetensors", path): path for path in network.glob("*.safetensors")}
    index = {
        _variant(rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json", path): path
        for path in network.glob("*.safetensors.index*.json")
    }
    for paths in (index, single) if kind == "text_encoder" else (single, index):  # the later one wins
        found |= {variant: path for variant, path in paths.items() if variant != ""}
    order: list[str | None] = [None, "fp16", "bf16", *sorted(v for v in found if v and v != "non_ema"), "non_ema"]
    chosen = next((variant for variant in order if variant in found), None)
    if not found:
        return Weights(())
    taken = found.pop(chosen)
    others = tuple(sorted(path.name for path in found.values()))
    if taken.suffix == ".safetensors":
        return Weights((taken,), None, chosen, others)
    return Weights(tuple(_indexed(taken)), taken, chosen, others)


def _variant(pattern: str, path: Path) -> str | None:
    """The variant in a file's name, None for none; "" where it is no network's file."""
    found = re.fullmatch(pattern, path.name)
    return found[1] if found else ""


def _indexed(path: Path) -> list[Path]:
    """The files that an index names."""
    names = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{path} holds no weight map: save the checkpoint again")
    files = []
    for name in sorted(set(names.values())):
        if not name.endswith(".safetensors") or "/" in name or not (path.parent / name).is_file():
            raise CheckpointError(f"{path} names {name!r:.80}, no safetensors file beside it: save it again")
        files.append(path.parent / name)
    return files


def count_parameters(network: Path) -> int:
    """The number of weights in a network's safetensors files, from their headers."""
    return sum(math.prod(shape) for path in weights_of(network).files for shape in read_shapes(path).values())


def read_shapes(path: Path) -> Mapping[str, list[int]]:
    """The tensors' names and shapes in a safetensors file; the weights are not read. Raises CheckpointError."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[Mapping[str, list[int]], Mapping[str, object]]:
    """Names and shapes of a safetensors file's tensors, and its metadata. Raises CheckpointError.

    The header is checked against the file: known types, sizes that fit, tensors side by side up to the file's end.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        tensors = {name: info for name, info in header.items() if name != "__metadata__"}
        end = 0
        for name, info in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            shape, (begin, after) = info["shape"], info["data_offsets"]
            whole = all(type(n) is int and 0 <= n < 2**48 for n in [*shape, begin, after])
            if not whole or len(shape) > MAX_DIMENSIONS:
                raise ValueError(f"{printable(name, 80)} has an absurd shape or place")
            if begin != end or after - begin != math.prod(shape) * BYTES[info["dtype"]]:
                raise ValueError(f"{printable(name, 80)} does not lie where its shape and its type say")
            end = after
        if end != size - 8 - length:
            raise ValueError("it ends elsewhere than its header says")
        metadata = header.get("__metadata__")
        return {name: info["shape"] for name, info in tensors.items()}, metadata if isinstance(metadata, dict) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {one_line(error)}") from None
