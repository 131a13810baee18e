"""The hub: push, then open gives the same images; what is wrong or missing there is one line, by a local server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from kdc_edge.bundle import Bundle
from kdc_edge.diffusers_folder import hash_checkpoint, training_note
from kdc_edge.errors import BundleError, CheckpointError, HubError, InputError
from kdc_edge.hub import hub_id, label, local, push
from kdc_edge.hub_card import make_card
from kdc_edge.manifest import MANIFEST
from kdc_edge.runtimes.pipeline import Pipeline
from kdc_edge.train.checkpoint import find_teacher
from tests.core.hub_server import TOKEN, HubServer

# huggingface_hub 2.4 uploads by an argument that its HTTP library is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "someone/flowers"
PROMPT = "a red flower"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    disable_progress_bars()
    with HubServer() as server:
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server
    enable_progress_bars()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def image(place: Path | str) -> np.ndarray:
    return np.asarray(Pipeline.open(place, threads=1)(PROMPT, num_inference_steps=1, seed=1).images[0])


def test_what_is_pushed_opens_from_the_hub_with_the_same_image(
    hub: HubServer, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = push(bundle, NAME, card=make_card(bundle, NAME, licence="apache-2.0", base_model="owner/teacher"))
    assert url.startswith(hub.url)
    pushed = hub.head(NAME)
    assert set(pushed) == {*Bundle.open(bundle).manifest.files, MANIFEST, "README.md", ".gitattributes"}
    card = pushed["README.md"].decode()
    assert card == hub.cards[0]  # the hub looked at its header
    assert 'license: "apache-2.0"\nbase_model: "owner/teacher"\n' in card
    assert f"--bundle hf:{NAME}" in card
    assert str(Bundle.open(bundle).manifest.image_parity.text) in card  # type: ignore[union-attr]
    pushed["extra.bin"] = b"nobody asked for this"
    expected = image(bundle)
    assert np.array_equal(image(f"hf:{NAME}"), expected)
    folder = local(f"hf:{NAME}@main")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        *Bundle.open(bundle).manifest.files, MANIFEST,
    }  # fmt: skip
    assert label(folder) == f"{NAME}@{folder.name[:8]}"
    assert hub_id(label(folder)) == NAME
    assert Bundle.open(folder).verify()
    offline(monkeypatch)
    before = len(hub.requests)
    assert np.array_equal(image(f"hf:{NAME}"), expected)
    assert len(hub.requests) == before


def test_a_checkpoint_is_pushed_without_pickles_and_is_a_teacher_again(hub: HubServer, own_checkpoint: Path) -> None:
    (own_checkpoint / "unet" / "notes.pkl").write_bytes(b"never")
    (own_checkpoint / "prompts.txt").write_text(PROMPT)
    (own_checkpoint / "sources.json").write_text('{"sources": []}')
    (own_checkpoint / "training.json").write_text('{"note": "step 3 of 9"}')
    (own_checkpoint / "README.md").write_text('---\nbase_model: "garden-teacher"\n---\n\n# Mine\n')
    push(own_checkpoint, NAME, card=make_card(own_checkpoint, NAME))
    assert not [file for file in hub.head(NAME) if file.endswith(".pkl")]
    card = hub.head(NAME)["README.md"].decode()
    assert "# Mine" in card
    assert "base_model" not in card  # the name of a folder, which the hub would refuse
    hub.head(NAME)["unet/diffusion_pytorch_model.bin"] = b"a pickle"
    for name in (NAME, f"hf:{NAME}"):
        folder = find_teacher(name)
        assert not list(folder.rglob("*.bin"))
        assert (folder / "prompts.txt").read_text() == PROMPT
        assert training_note(folder) == "step 3 of 9"
        assert hash_checkpoint(folder) == hash_checkpoint(own_checkpoint)


@pytest.mark.parametrize("size", ["same", "other"])
def test_a_file_that_is_not_the_manifests_is_refused(hub: HubServer, bundle: Path, size: str) -> None:
    push(bundle, NAME, card="")
    name = "tokenizer/vocab.json"
    content = hub.head(NAME)[name]
    hub.head(NAME)[name] = content[:-1] + (b" " if size == "same" else b"  ")
    words = "vocab.json has changed" if size == "same" else "vocab.json has .* bytes where"
    with pytest.raises(HubError, match=rf"hf:{NAME} is not as its manifest says: .*{words}"):
        local(f"hf:{NAME}")


def test_a_missing_file_is_one_line(hub: HubServer, bundle: Path) -> None:
    push(bundle, NAME, card="")
    del hub.head(NAME)["tokenizer/merges.txt"]
    with pytest.raises(HubError, match=r"merges\.txt is missing: the bundle is incomplete"):
        local(f"hf:{NAME}")


def test_a_bundle_with_a_pickle_is_refused_before_it_is_fetched(hub: HubServer, bundle: Path) -> None:
    push(bundle, NAME, card="")
    manifest = json.loads(hub.head(NAME)[MANIFEST])
    manifest["files"]["unet/weights.pt"] = {"size_bytes": 1, "sha256": "0" * 64}
    hub.head(NAME)[MANIFEST] = json.dumps(manifest).encode()
    with pytest.raises(HubError, match=r"'unet/weights\.pt' is a pickle"):
        local(f"hf:{NAME}")
    assert not [r for r in hub.requests if r.startswith("GET") and r.endswith(".onnx")]


def test_what_cannot_be_had_is_one_line(hub: HubServer, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(bundle, NAME, card="")
    for name, words in {
        "hf:someone/else": "no such repository, or a private one",
        f"hf:{NAME}@v9": "it has no such revision",
    }.items():
        with pytest.raises(HubError, match=words) as failure:
            local(name)
        assert TOKEN not in str(failure.value)
    for name in ("hf:flowers", "hf:", f"hf:{NAME}@", "hf:a/b/c", "hf:../x"):
        with pytest.raises(InputError, match="names no repository: use hf:OWNER/NAME"):
            local(name)
    hub.head(NAME).pop(MANIFEST)
    hub.head(NAME).pop("model_index.json")
    with pytest.raises(HubError, match="is neither a bundle nor a checkpoint"):
        local(f"hf:{NAME}")
    offline(monkeypatch)
    with pytest.raises(HubError, match="not in the cache, not all of it, and HF_HUB_OFFLINE is set"):
        local("hf:someone/else")
    with pytest.raises(CheckpointError, match="someone/else is neither a folder nor can it be had from the hub"):
        find_teacher("someone/else")


def test_without_a_network_the_cache_is_used_and_the_rest_is_one_line(
    hub: HubServer, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bundle, NAME, card="")
    folder = local(f"hf:{NAME}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    before = len(hub.requests)
    assert local(f"hf:{NAME}") == folder
    assert len(hub.requests) == before
    with pytest.raises(HubError, match="the hub cannot be reached: check the network"):
        local("hf:someone/else")
    with pytest.raises(HubError, match="the hub cannot be reached: check the network"):
        push(bundle, NAME, card="")
    shutil.rmtree(folder / "unet")
    offline(monkeypatch)
    with pytest.raises(HubError, match="not in the cache, not all of it"):
        local(f"hf:{NAME}")


def test_a_push_that_cannot_be_is_one_line(hub: HubServer, own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match=r"the hub refuses this account \(status 403\)"):
        push(own_bundle, "stranger/flowers", card="")
    push(own_bundle, NAME, card="", revision="v1")
    assert MANIFEST in hub.head(NAME, "v1")
    assert MANIFEST not in hub.head(NAME)
    with pytest.raises(HubError, match=f"hf:{NAME} is there and public"):
        push(own_bundle, NAME, card="", private=True)
    push(own_bundle, "someone/secret", card="", private=True)
    assert hub.repositories["someone/secret"].private
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(HubError, match=r"no such repository|refuses this account") as failure:
        push(own_bundle, NAME, card="")
    assert "hf_another" not in str(failure.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no token for the hub: log in with hf auth login"):
        push(own_bundle, NAME, card="")
    with pytest.raises(InputError, match="names no repository: use OWNER/NAME"):
        push(own_bundle, "flowers", card="")
    (own_bundle / "tokenizer" / "merges.txt").write_bytes(
        b" " * (own_bundle / "tokenizer" / "merges.txt").stat().st_size
    )
    before = len(hub.requests)
    with pytest.raises(BundleError, match="has changed since it was exported"):
        push(own_bundle, NAME, card="")
    assert len(hub.requests) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"licence": "Apache 2"}, "--licence 'Apache 2' is no identifier"),
        ({"base_model": "x"}, "--base-model 'x' is no"),
    ],
)
def test_a_card_that_the_hub_would_refuse_is_refused(bundle: Path, given: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_card(bundle, NAME, **given)
