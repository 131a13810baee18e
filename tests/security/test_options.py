"""Options are checked before work: unknown choices name the nearest, and what cannot be done is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdc_edge.bench.case import Case
from kdc_edge.errors import InputError, UsageError, unknown_choice
from kdc_edge.request import Request
from kdc_edge.runtimes import LoadOptions, open_pipeline
from kdc_edge.train.tools.experiments import Size, cells
from tests.cli.test_commands import complaint, run


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate x --bundle BUNDLE --scheduler euler_a", "scheduler 'euler_a' is unknown, did you mean euler-a?"),
        ("generate x --bundle BUNDLE --engine onnx", "onnx cannot run onnx-fp16"),
        ("generate x --bundle BUNDLE --device CPU.3", "onnxruntime has no device 'CPU.3' here, did you mean CPU?"),
        ("generate x --bundle BUNDLE --device cuda:7", "onnxruntime has no device 'cuda:7' here: choose from CPU"),
        (
            "generate x --bundle BUNDLE --guidance-mode batch",
            "guidance mode 'batch' is unknown, did you mean batched",
        ),
        ("generate x --num-inference-steps 3", "--num-inference-steps (Possible options: --steps)"),
        ("generate x --cfg 3", "--cfg (Possible options: --guidance)"),
        ("export x --precision int4", "onnx has no precision 'int4', did you mean int8?"),
        ("export x --target onxx", "--target 'onxx' is unknown, did you mean onnx?"),
        ("export x --attention fusd", "--attention 'fusd' is unknown, did you mean fused?"),
        ("init --preset kdc482 --out new", "--preset 'kdc482' is unknown, did you mean kdc-482m?"),
        ("bench BUNDLE --format jsn", "--format 'jsn' is unknown, did you mean json?"),
        ("bench BUNDLE --fail-over end_to_end=3", "'end_to_end' is not measured, did you mean end_to_end_sec?"),
        ("bench BUNDLE --guidance-mode loud", "--guidance-mode 'loud' is unknown: choose from batched, sequential"),
        ("fit --formats onnx-f16", "--formats 'onnx-f16' is unknown, did you mean onnx-fp16?"),
        ("train --student kdc482", "--student 'kdc482' is unknown, did you mean kdc-482m?"),
        ("train --dry-run --student kdc482", "--student 'kdc482' is unknown, did you mean kdc-482m?"),
    ],
)
def test_a_wrong_choice_is_wrong_usage_and_names_the_nearest(
    bundle: Path, tmp_path: Path, command: str, says: str
) -> None:
    code = 1 if "cannot run" in says else 2
    words = [str(bundle) if word == "BUNDLE" else word for word in command.split()]
    assert says in complaint(*words, cwd=tmp_path, code=code)


def test_the_nearest_is_found_whatever_its_case() -> None:
    assert "did you mean CPU?" in str(unknown_choice("--device", "cpu0", ["CPU", "GPU"]))
    with pytest.raises(UsageError, match="--grid 'replays' is unknown, did you mean replay"):
        cells(["replays"], Size())


@pytest.mark.parametrize(
    "command", ["generate x --bundle BUNDLE", "bench BUNDLE", "fit --no-export", "serve --bundle BUNDLE"]
)
def test_no_command_starts_threads_without_end(bundle: Path, tmp_path: Path, command: str) -> None:
    words = [str(bundle) if word == "BUNDLE" else word for word in command.split()]
    assert "100000 threads are too many for" in complaint(*words, "--threads", 100_000, cwd=tmp_path)


def test_nor_does_python(bundle: Path) -> None:
    for threads, says in ((0, "too few"), (100_000, "too many")):
        with pytest.raises(InputError, match=says):
            open_pipeline(bundle, threads=threads)
        with pytest.raises(InputError, match=says):
            LoadOptions(threads=threads)
        with pytest.raises(InputError, match=says):
            Case(bundle, Request("x"), threads=threads)


def test_a_size_whose_activations_cannot_fit_is_refused_with_the_estimate(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = open_pipeline(bundle)
    pipeline.check(Request("x", width=4096, height=4096))
    monkeypatch.setattr("kdc_edge.pipeline.free_memory_bytes", lambda: 10**9)
    pipeline.check(Request("x", width=1024, height=1024))
    with pytest.raises(
        InputError,
        match=r"4096x4096 needs more than 4,295 MB for the decoder.s activations alone, and 1,000 MB are free",
    ):
        pipeline.check(Request("x", width=4096, height=4096))


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--batch-size 16 --accumulate 3", "--accumulate 3: use a multiple of 3"),
        ("--device cuda", "--device cuda is not here"),
        ("--resolution 100", "--resolution 100 does not fit this teacher"),
        ("--objective phased --phases 3", "--phases 3"),
        ("--out taken", "taken exists and holds other files"),
        ("--task a=imagefolder:nowhere", "nowhere"),
        ("--continue-from taken --task a=garden:fish", "taken/config.json is missing"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses_and_leaves_nothing(tmp_path: Path, option: str, says: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    for more in (["--dry-run"], []):
        assert says in complaint("train", *option.split(), *more, cwd=tmp_path)


def test_a_dry_run_that_is_taken_leaves_nothing(tmp_path: Path) -> None:
    assert "memory about" in run("train", "--dry-run", cwd=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


def test_bench_leaves_the_hashes_out_where_it_is_told_to(own_bundle: Path, tmp_path: Path) -> None:
    path = own_bundle / "tokenizer" / "tokenizer_config.json"
    path.write_bytes(path.read_bytes().replace(b"\n", b" ", 1))
    words = ("bench", own_bundle, "--steps", 1, "--repeats", 1, "--warmup", 0)
    assert "has changed since it was exported" in run(*words, cwd=tmp_path, code=1).stderr
    run(*words, "--no-check", cwd=tmp_path)
