"""Checkpoint folders: other programs open them, teachers are found where they are, and the account is right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from kdc_edge.diffusers_folder import read_model
from kdc_edge.errors import CheckpointError, InputError
from kdc_edge.presets import find_preset
from kdc_edge.quiet import quiet
from kdc_edge.runtimes.torch import load_network
from kdc_edge.tokenizer import Tokenizer
from kdc_edge.train.checkpoint import GARDEN_TEACHER, find_teacher, init_checkpoint, save_text_encoder
from kdc_edge.train.student import describe_account
from tests.cli.test_commands import run

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_an_inherited_checkpoint_opens_in_diffusers_and_says_where_its_weights_came_from(tmp_path: Path) -> None:
    done = run("init", "--preset", "garden-student", "--from", "garden", "--out", "student", cwd=tmp_path)
    assert done.stdout == "student\n"
    assert "Writing model shards" not in done.stderr
    assert "up_blocks.1.attentions.1 <- up_blocks.1.attentions.2" in done.stderr
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "student", local_files_only=True)
    theirs = load_file(GARDEN_TEACHER / UNET)
    ours = pipeline.unet.state_dict()
    assert torch.equal(ours["up_blocks.1.resnets.1.conv1.weight"], theirs["up_blocks.1.resnets.2.conv1.weight"].float())
    assert (tmp_path / "student" / "tokenizer" / "vocab.json").is_file()


def test_a_teacher_with_a_safety_checker_leaves_none_in_the_students_index(tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher"))
    index = json.loads((teacher / "model_index.json").read_text("utf-8"))
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (teacher / "model_index.json").write_text(json.dumps(index))
    init_checkpoint(tmp_path / "student", find_preset("garden-student"), teacher, seed=0)
    with quiet():
        StableDiffusionPipeline.from_pretrained(tmp_path / "student", local_files_only=True)


def test_a_folder_with_tokenizer_json_alone_is_read_and_completed(tmp_path: Path) -> None:
    """transformers 5 saves no vocab.json."""
    teacher = Path(shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher"))
    words = Tokenizer.from_folder(teacher / "tokenizer")
    vocab = json.loads((teacher / "tokenizer" / "vocab.json").read_text("utf-8"))
    merges = [line.split() for line in (teacher / "tokenizer" / "merges.txt").read_text("utf-8").splitlines()[1:]]
    for name in ("vocab.json", "merges.txt"):
        (teacher / "tokenizer" / name).unlink()
    whole = {"model": {"type": "BPE", "vocab": vocab, "merges": merges}}
    (teacher / "tokenizer" / "tokenizer.json").write_text(json.dumps(whole))
    texts = ["a purple flower with five petals", "fish"]
    assert (Tokenizer.from_folder(teacher / "tokenizer").encode(texts) == words.encode(texts)).all()
    init_checkpoint(tmp_path / "student", find_preset("garden-student"), teacher, seed=0)
    assert json.loads((tmp_path / "student" / "tokenizer" / "vocab.json").read_text("utf-8")) == vocab


def test_a_teacher_with_another_text_width_and_velocity_prediction_fits(tmp_path: Path) -> None:
    """As Stable Diffusion 2.x: its own text width, heads of its own number in each stage, linear projections."""
    teacher = Path(shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher"))
    shape = dict(find_preset("garden-teacher").unet) | {
        "cross_attention_dim": 1024, "attention_head_dim": (2, 4, 5, 5), "use_linear_projection": True,
    }  # fmt: skip
    with quiet():
        UNet2DConditionModel(**shape).save_pretrained(teacher / "unet")
        text = CLIPTextConfig(vocab_size=300, hidden_size=1024, intermediate_size=64, num_hidden_layers=1)
        CLIPTextModel(text).save_pretrained(teacher / "text_encoder")
    scheduler = json.loads((teacher / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    (teacher / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler | {"prediction_type": "v_prediction"})
    )
    account = init_checkpoint(tmp_path / "student", find_preset("garden-student"), teacher, seed=0)
    assert all(account.values())
    student = load_network(tmp_path / "student", "unet")
    assert student.config.cross_attention_dim == 1024
    assert student.config.use_linear_projection
    assert read_model(tmp_path / "student").scheduler["prediction_type"] == "v_prediction"


def test_a_preset_of_other_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bk-tiny does not fit this teacher: its stages have 320/640/1280 channels"):
        init_checkpoint(tmp_path / "student", find_preset("bk-tiny"), GARDEN_TEACHER, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_the_account_names_what_stayed_random() -> None:
    lines = describe_account({"conv_in.weight": "conv_in.weight", "mid_block.a": None, "mid_block.b": None})
    assert lines == ["1 of 3 tensors inherited: 1 by the same name, 0 moved", "  mid_block: random (2 tensors)"]


def test_a_hub_id_is_taken_from_the_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in the hub's own layout; no network is asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0" * 40
    snapshot = tmp_path / "hub" / "models--someone--garden" / "snapshots" / commit
    shutil.copytree(GARDEN_TEACHER, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    assert find_teacher("someone/garden") == snapshot
    with pytest.raises(CheckpointError, match="someone/else is neither a folder nor can it be had from the hub"):
        find_teacher("someone/else")


def test_a_missing_folder_is_no_hub_id(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        find_teacher(str(tmp_path / "teacher"))


@pytest.mark.full
def test_the_482m_student_takes_every_tensor_from_a_random_teacher_of_full_size(tmp_path: Path) -> None:
    """A folder that diffusers opens, and each copied tensor equal to its source."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert not any(init_checkpoint(teacher, find_preset("sd1-teacher"), None, seed=1).values())
    account = init_checkpoint(student, find_preset("kdc-482m"), teacher, seed=2)
    assert all(account.values())
    theirs, ours = load_file(teacher / UNET), load_file(student / UNET)
    assert sum(t.numel() for t in theirs.values()) == 859_520_964
    assert sum(t.numel() for t in ours.values()) == 482_346_884
    assert all(torch.equal(ours[name], theirs[str(source)]) for name, source in account.items())
    del theirs, ours
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(student, local_files_only=True)
    ids = pipeline.tokenizer("a photo of a red flower").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 736, 4055, 49407]


def test_pickled_teachers_are_refused(tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(GARDEN_TEACHER, tmp_path / "teacher"))
    (teacher / UNET).rename(teacher / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        find_teacher(str(teacher))
    save_file({"a": torch.zeros(1)}, teacher / UNET)
    with pytest.raises(CheckpointError, match="lacks"):
        load_network(teacher, "unet")


def test_a_text_encoder_has_the_names_of_the_published_checkpoints(tmp_path: Path) -> None:
    """transformers 4 reads no others, and takes random weights in their place."""
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    network = CLIPTextModel(config)
    save_text_encoder(network, tmp_path)
    for folder in (tmp_path, GARDEN_TEACHER / "text_encoder"):
        assert all(name.startswith("text_model.") for name in load_file(folder / "model.safetensors"))
    again = CLIPTextModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in network.state_dict().items())
