"""Added tokens against diffusers' load_textual_inversion, and the tokenizer of the folder against transformers'."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from kdc_edge.checkpoints import Additions, open_checkpoint
from kdc_edge.checkpoints.embedding import Embedding
from kdc_edge.errors import CheckpointError
from kdc_edge.quiet import quiet
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.teachers import GARDEN_TEACHER
from tests.checkpoints.test_single_file import EQUAL_DB, distance

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
ONE, THREE = torch.randn(128, generator=torch.Generator().manual_seed(0)), torch.randn(3, 128)


def write(state: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


@pytest.mark.parametrize(
    ("state", "given", "token", "prompt"),
    [
        ({"<cat-toy>": ONE}, "", "<cat-toy>", "a photo of a <cat-toy> on grass"),
        ({"emb_params": THREE}, ":rosette", "rosette", "a rosette, rosettes"),
        ({"string_to_param.*": THREE}, "", "mine", "a Mine with five petals"),
    ],
)
def test_an_added_token_gives_the_image_of_diffusers(
    tmp_path: Path, state: dict[str, Tensor], given: str, token: str, prompt: str
) -> None:
    path = write(state, tmp_path / "mine.safetensors")
    said: list[str] = []
    additions = Additions(embeddings=(Embedding.parse(f"{path}{given}"),))
    folder = open_checkpoint(GARDEN_TEACHER, additions, say=said.append)
    vectors = torch.atleast_2d(next(iter(state.values())))
    assert f"mine.safetensors: {token} in a prompt is {len(vectors)} token" in said[0]
    with quiet():
        theirs = StableDiffusionPipeline.from_pretrained(GARDEN_TEACHER, torch_dtype=torch.float32)
        theirs.load_textual_inversion({token: vectors}, token=token)
    text = theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
    ids = theirs.tokenizer(text, padding="max_length", truncation=True, max_length=77, return_tensors="np").input_ids
    assert Tokenizer.from_folder(folder / "tokenizer").encode([prompt]).tolist() == ids.tolist()
    assert distance(folder, theirs, prompt) > EQUAL_DB


@pytest.mark.parametrize("layout", ["vocabulary", "decoder", "tokenizer.json"])
def test_transformers_reads_the_tokens_in_every_layout(tmp_path: Path, layout: str) -> None:
    teacher = Path(shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher"))
    tokenizer = teacher / "tokenizer"
    if layout != "vocabulary":
        CLIPTokenizer.from_pretrained(tokenizer).save_pretrained(tokenizer)
    if layout == "tokenizer.json":
        (tokenizer / "vocab.json").unlink()
        (tokenizer / "merges.txt").unlink()
    path = write({"<x>": THREE}, tmp_path / "x.safetensors")
    folder = open_checkpoint(teacher, Additions(embeddings=(Embedding(path), Embedding(path, "<y>"))))
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ours = Tokenizer.from_folder(folder / "tokenizer")
    prompt = "a <x> <x>_1 <x>_2 and <y> <y>_1 <y>_2"
    ids = theirs(prompt, padding="max_length", max_length=77, return_tensors="np").input_ids
    assert ours.encode(["a <x> and <y>"]).tolist() == ids.tolist()
    assert ids[0, 2:5].tolist() == [610, 611, 612]


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for state, token, said in (
        ({"<x>": torch.zeros(2, 64)}, None, "has 64 channels a token and the text encoder 128"),
        ({"<x>": ONE}, "flower</w>", "is a token of this checkpoint already"),
        ({"<x>": ONE}, "two words", "is no token: give a word"),
        ({"clip_l": ONE, "clip_g": ONE}, None, "of Stable Diffusion XL"),
        ({"a": ONE, "b": ONE}, None, "is no textual inversion"),
    ):
        path = write(dict(state), tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(GARDEN_TEACHER, Additions(embeddings=(Embedding(path, token),)))
    (tmp_path / "x.pt").touch()
    with pytest.raises(CheckpointError, match="is a pickle"):
        open_checkpoint(GARDEN_TEACHER, Additions(embeddings=(Embedding(tmp_path / "x.pt"),)))
