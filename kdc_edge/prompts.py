"""The prompts that an export proves and calibrates itself on: the user's, the checkpoint's own, or general ones."""

from __future__ import annotations

from pathlib import Path

from kdc_edge.diffusers_folder import PROMPTS_FILE
from kdc_edge.errors import InputError
from kdc_edge.files import read_bounded

GENERAL = ("a photo of a red flower", "a blue butterfly with white spots on a dark background")
MAX_BYTES = 10 * 2**20


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines do not count. Raises InputError."""
    try:
        text = read_bounded(path, MAX_BYTES, InputError).decode("utf-8-sig")  # Windows' editors write the mark
        found = [line.strip() for line in text.splitlines() if line.strip()]
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a text file with one prompt a line") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read as text: {error}; save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}; give a text file") from None
    if not found:
        raise InputError(f"{path} holds no prompts: write one a line")
    return found


def own_prompts(checkpoint: Path) -> list[str]:
    """The captions that came with the checkpoint, or a few general ones."""
    path = checkpoint / PROMPTS_FILE
    return read_prompts(path) if path.is_file() else list(GENERAL)
