"""Reports to nobody: the engines' and libraries' telemetry is switched off before any of them is imported.

Read by `kdc_edge/__init__.py`, so that it holds in every process that imports us: commands, workers, Python programs.
What the user has set in the environment stays.
"""

from __future__ import annotations

import os
import sys

SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime 1.32 starts at import: files in cache and temp folders, DNS look-ups
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, and by it transformers, diffusers, datasets
    "DO_NOT_TRACK": "1",  # the convention that most others read
    "WANDB_ERROR_REPORTING": "false",  # only --log-with wandb imports it: the run is logged, its crashes are not
    "GRADIO_ANALYTICS_ENABLED": "False",  # under trackio, for --log-with trackio
}
PACKAGES = ("openvino_telemetry",)  # under openvino and nncf, which do without where it is not installed


def switch_off() -> None:
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
    for package in PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]
