"""Trackers beside metrics.jsonl: TensorBoard, wandb or trackio, through accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from kdc_edge.train.config import TrainConfig


class Tracker:
    """Logs every step's losses; does nothing where --log-with is none."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, run: Path, *, since: int) -> None:
        self.accelerator, self.on = accelerator, config.log_with != "none"
        if self.on:
            options: dict[str, dict[str, Any]] = {
                "tensorboard": {"purge_step": since + 1} if since else {},  # drop steps logged after the saved state
                "wandb": {"name": run.name, "dir": str(run)},
                "trackio": {"name": run.name},
            }
            name = "tensorboard" if config.log_with == "tensorboard" else "kdc-edge"  # a folder or a project
            accelerator.init_trackers(name, init_kwargs=options)

    def log(self, losses: dict[str, float], by_timestep: list[float | None], rate: float, step: int) -> None:
        if self.on:
            bins = {f"loss by timestep/{i}": v for i, v in enumerate(by_timestep) if v is not None}
            self.accelerator.log(
                {f"loss/{n}": v for n, v in losses.items()} | bins | {"learning rate": rate}, step=step
            )

    def log_image(self, path: Path, step: int) -> None:
        """A sheet of samples."""
        if self.on and self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                if hasattr(tracker, "log_images"):  # trackio's has none
                    layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                    with Image.open(path) as sheet:
                        tracker.log_images({"samples": np.asarray(sheet)[None]}, step=step, **layout)

    def finish(self) -> None:
        """Close the logs, and the processes' connection: nothing may be asked of other processes after it."""
        self.accelerator.end_training()
