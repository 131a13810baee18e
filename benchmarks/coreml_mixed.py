"""Size against error and prompt accuracy, mixed bits beside plain palettes, on the garden: docs/coreml.md's curve.

    python benchmarks/coreml_mixed.py [FOLDER]        # rows.json and images in FOLDER; the search is kept there too

Weights are those that the packages store; arithmetic is PyTorch's, fp32. Calibration and held-out inputs come from
different prompts.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdc_edge.diffusers_folder import read_model
from kdc_edge.export.calibration import calibrate
from kdc_edge.export.components import load_component
from kdc_edge.export.coreml.apple_modules import apple_network
from kdc_edge.export.coreml.export import convert
from kdc_edge.export.coreml.mixed import BITS, Search
from kdc_edge.image import grid, save_png
from kdc_edge.report.charts import line_chart
from kdc_edge.runtimes.torch import load_network
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.checkpoint import GARDEN_TEACHER
from kdc_edge.train.data.sources import GardenSource
from kdc_edge.train.garden.judge import LABELS, load_judge
from kdc_edge.train.quality.evaluate import evaluation_scenes, torch_generator

SUBJECTS = ("flower", "butterfly")
SHOWN = ((0, 0), (0, 30), (1, 1), (1, 31))  # (subject, prompt): two seen in training, two held out
ROWS = ("fp32", "palette4", "mixed4", "palette2", "mixed2")
STYLE = """<style>text{font:12.5px sans-serif;fill:#555}.end{text-anchor:end}.mid{text-anchor:middle}.grid{stroke:#ddd}
.axis{stroke:#888}.line{fill:none;stroke-width:2.25}.line.c1{stroke-dasharray:7 4.5}
.c0{stroke:#0072b2}.c1{stroke:#d55e00}
.dot.c0{fill:#0072b2}.dot.c1{fill:#d55e00}</style><rect width="100%" height="100%" fill="#fff"/>
<text x="340" y="250" style="fill:#0072b2">mixed: solid</text>
<text x="340" y="268" style="fill:#d55e00">plain palettes: dashed</text>"""


class Measure:
    """Everything that is asked of one recipe."""

    def __init__(self, folder: Path) -> None:
        self.model = read_model(GARDEN_TEACHER)
        part: Any = load_component(GARDEN_TEACHER, "unet")
        self.unet = part.module.unet
        package = convert(apple_network(part, self.model, unet_batch=2), half=True, target="iOS17")
        seen, unseen = ([s.caption for s in self._scenes(seed)] for seed in (5, 6))
        calibration = calibrate(GARDEN_TEACHER, seen, 12, seed=0, samples_an_image=1)
        heldout = calibrate(GARDEN_TEACHER, unseen, 16, seed=1, samples_an_image=1)
        self.search = Search(self.unet, package, calibration, folder / "search", print)
        self.heldout = Search(self.unet, package, heldout, folder / "search", print)  # for its inputs alone
        tokenizer = Tokenizer.from_folder(GARDEN_TEACHER / "tokenizer")
        text_encoder, vae = (load_network(GARDEN_TEACHER, name) for name in ("text_encoder", "vae_decoder"))
        self.generate = torch_generator(self.model, tokenizer, text_encoder, self.unet, vae)
        self.judge = load_judge()
        self.reference: np.ndarray | None = None

    def _scenes(self, seed: int) -> list[Any]:
        return [s for subject in SUBJECTS for s in GardenSource((subject,)).scenes(40, seed=seed, split="train")]

    def __call__(self, bits: Mapping[str, int] | None) -> tuple[dict[str, Any], list[np.ndarray]]:
        """A row of the table, and the images that are shown; None is the U-Net as it is."""
        row: dict[str, Any] = {"size_bytes": bits and self.search.size_bytes(bits)}
        row["psnr_db"] = bits and self.heldout.psnr_db(bits)
        self.search.set_weights(bits or {})
        scenes = [evaluation_scenes(GardenSource((subject,)), 48) for subject in SUBJECTS]
        images = [self.generate([s.caption for s in chosen], seed=7) for chosen in scenes]
        self.search.restore(list(bits or {}))
        found = [self.judge.agreement(p, s) for p, s in zip(images, scenes, strict=True)]
        row["accuracy"] = [float(np.mean([f[name] for name in LABELS])) for f in found]
        together = np.concatenate(images).astype(float)
        if self.reference is None:
            self.reference = together
        else:
            row["image_psnr_db"] = float(10 * np.log10(255**2 / np.mean((together - self.reference) ** 2)))
        return row, [images[subject][i] for subject, i in SHOWN]


def main(folder: Path) -> None:
    measure = Measure(folder)
    search, steps = measure.search, measure.search.steps()
    plain = {bits: dict.fromkeys(search.layers, bits) for bits in BITS}
    sizes = {bits: search.size_bytes(recipe) for bits, recipe in plain.items()}
    budgets = {"mixed5": (sizes[6] + sizes[4]) // 2, "mixed4": sizes[4], "mixed3": (sizes[4] + sizes[2]) // 2,
               "mixed2": sizes[2], "mixed1.5": (sizes[2] + sizes[1]) // 2}  # fmt: skip
    recipes: dict[str, Mapping[str, int] | None] = {"fp32": None}
    recipes |= {f"palette{bits}": recipe for bits, recipe in plain.items()}
    recipes |= {name: search.bits_after(steps[: search.until_size(steps, size)]) for name, size in budgets.items()}
    rows, images = {}, {}
    for name, bits in recipes.items():
        rows[name], images[name] = measure(bits)
        print(name, json.dumps(rows[name]), flush=True)
    (folder / "rows.json").write_text(json.dumps(rows, indent=2))
    shown = grid([p for name in ROWS for p in images[name]], len(SHOWN))
    save_png(folder / "coreml-mixed.png", shown.repeat(2, axis=0).repeat(2, axis=1), None)
    (folder / "coreml-mixed.svg").write_text(chart(rows))


def chart(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """An SVG file of its own: the chart of bench/charts.py with its style inside."""
    lines = {
        name: sorted((r["size_bytes"] / 1e6, r["psnr_db"]) for n, r in rows.items() if n.startswith(prefix))
        for name, prefix in (("mixed", "mixed"), ("plain palettes", "palette"))
    }
    figure = line_chart(lines, title="Size against error", x_label="MB", y_label="PSNR on held-out inputs, dB")
    svg = max(re.findall(r"<svg.*?</svg>", figure, re.S), key=len)
    return re.sub("<svg([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg"\1>{STYLE}', svg, count=1) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("coreml-mixed"))
