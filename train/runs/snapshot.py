"""A checkpoint of a run that is still going: the EMA student of its newest saved state.

folder = write_snapshot(Path("runs/001"))            # RUN/checkpoints/step.120, which diffusers opens
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError
from kdc_edge.files import read_json
from kdc_edge.manifest import Model
from kdc_edge.presets import find_preset
from kdc_edge.train.checkpoint import write_checkpoint
from kdc_edge.train.config import TrainConfig
from kdc_edge.train.distributed import under
from kdc_edge.train.networks import latent_side
from kdc_edge.train.runs.states import CHECKPOINTS, MODEL_FILE, load_state
from kdc_edge.train.student import student_config


def write_snapshot(run: Path) -> Path:
    """Write the newest state's student beside the run's checkpoints, in place of an older one.

    The folder says what it is, and so does the manifest of a bundle made from it. Raises CheckpointError where the run
    has saved no state yet.
    """
    config = TrainConfig.load(run)
    position, tensors, _ = load_state(run)
    out = run / CHECKPOINTS / f"step.{position.total}"  # no task has a dot in its name
    task = config.tasks[min(position.task, len(config.tasks) - 1)]
    note = f"step {position.total} of {position.end(config)}, task {task.name}; the run was not finished"
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**_plain(config.teacher / "unet" / "config.json"))
    unet = UNet2DConditionModel(**student_config(find_preset(config.student), teacher))
    unet.load_state_dict(under("student/", tensors) | under("ema/", tensors))  # no average is taken of buffers
    path = run / MODEL_FILE
    model = Model.model_validate(read_json(path, CheckpointError)) if path.is_file() else read_model(config.teacher)
    unet.register_to_config(sample_size=latent_side(config, model))
    prompts = [prompt for found in position.prompts.values() for prompt in found]
    write_checkpoint(out, unet, parts_from=config.teacher, model=model, prompts=prompts, note=note)
    for older in (run / CHECKPOINTS).glob("step.*"):
        if older != out:
            shutil.rmtree(older)
    return out


def _plain(path: Path) -> dict[str, object]:
    return {name: value for name, value in read_json(path, CheckpointError).items() if not name.startswith("_")}
