"""Tokens of textual inversion in an exported bundle: every target makes diffusers' image, by every tokenizer it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

from kdc_edge import Pipeline
from kdc_edge.bundle import Bundle
from kdc_edge.checkpoints import Additions, open_checkpoint
from kdc_edge.checkpoints.embedding import Embedding
from kdc_edge.export.targets import CoreMLOptions
from kdc_edge.image import psnr_db
from kdc_edge.quiet import quiet
from tests.export.apple_tokenizer import AppleTokenizer
from tests.export.editing import SEED

# diffusers 0.42 hands torch tensors to numpy 2 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
PROMPT = "a rosette beside a <cat-toy>"
WRITTEN_OUT = "a rosette rosette_1 rosette_2 beside a <cat-toy>"  # as programs other than kdc-edge need it
VECTORS = {
    token: 2 * torch.randn(count, 128, generator=torch.Generator().manual_seed(count))
    for token, count in (("<cat-toy>", 1), ("rosette", 3))
}


@pytest.fixture(scope="module")
def with_tokens(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a token of one vector and one of three."""
    root = tmp_path_factory.mktemp("tokens")
    embeddings = []
    for token, vectors in VECTORS.items():
        path = root / f"{len(vectors)}.safetensors"
        save_file({"emb_params": vectors}, path)
        embeddings.append(Embedding(path, token))
    return open_checkpoint(checkpoint, Additions(embeddings=tuple(embeddings)))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, np.ndarray]:
    """diffusers' images, its own loader having added the tokens; and one where they are letters."""
    with quiet():
        pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, local_files_only=True)
        letters = _by_diffusers(pipeline)
        for token, vectors in VECTORS.items():
            pipeline.load_textual_inversion({token: vectors}, token=token)
        return {"letters": letters, "tokens": _by_diffusers(pipeline)}


def _by_diffusers(pipeline: StableDiffusionPipeline) -> np.ndarray:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(SEED)
    (found,) = pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="np").images
    return np.asarray((found * 255).round(), np.uint8)


def test_an_exported_token_gives_the_image_of_diffusers(
    with_tokens: Path, expected: dict[str, np.ndarray], target: str, export_fp16: Callable[..., Bundle]
) -> None:
    said: list[str] = []
    options = CoreMLOptions(swift=True) if target == "coreml" else None
    made = export_fp16(with_tokens, "AppleTextEncoder", options, verify=False, tell=said.append)
    assert [source.role for source in made.manifest.provenance.sources] == ["checkpoint", "embedding", "embedding"]
    pipeline = Pipeline.open(made.root, exact=True)
    image = pipeline(PROMPT, num_inference_steps=2, seed=SEED, scheduler="ddim").images[0]
    assert psnr_db(np.asarray(image), expected["tokens"]) > 35
    assert psnr_db(expected["letters"], expected["tokens"]) < 30  # the tokens show
    if target == "openvino":
        assert openvino_ids(made) == pipeline.tokenizer.encode([PROMPT])[0].tolist()
    if target == "coreml":
        (line,) = [line for line in said if "Swift" in line]
        assert "splits these added tokens into letters: rosette, rosette_1, rosette_2; it reads" in line
        prompt = "a red flower beside a <cat-toy> in the garden"
        assert AppleTokenizer(made.root / "Resources").ids(prompt) == pipeline.tokenizer.ids(prompt, 75)


def openvino_ids(bundle: Bundle) -> list[int]:
    """By openvino_tokenizer.xml, which openvino_genai reads; padded as in kdc-edge."""
    import openvino
    import openvino_tokenizers  # noqa: F401  # it registers the operations

    compiled = openvino.Core().compile_model(bundle.root / "tokenizer" / "openvino_tokenizer.xml", "CPU")
    ids: list[int] = compiled([WRITTEN_OUT])["input_ids"][0].tolist()
    return ids + ids[-1:] * (77 - len(ids))
