"""The command line as a user types it: the bare workflow, and one clear line for what cannot be."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdc_edge.cli import main
from kdc_edge.cli.app import EXAMPLES
from kdc_edge.cli.serve import page_url
from tests.forks import MAIN, Fork


def run(*arguments: object, cwd: Path, code: int | None = 0) -> subprocess.CompletedProcess[str]:
    """kdc-edge in this process, which has PyTorch in memory already: what users type, hundreds of times over."""
    command = ["kdc-edge", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    found = 0
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", command)
        signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            main()
        except SystemExit as end:
            found = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for number, handler in signals.items():
                signal.signal(number, handler)
    done = subprocess.CompletedProcess(command, found, out.getvalue(), err.getvalue())
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done


def complaint(*arguments: object, cwd: Path, code: int = 1) -> str:
    """What the command says when it refuses: one line on stderr, nothing on stdout, nothing written."""
    before = sorted(cwd.rglob("*"))
    done = run(*arguments, cwd=cwd, code=code)
    assert done.stdout == ""
    assert sorted(cwd.rglob("*")) == before
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kdc-edge: ")
    assert "Traceback" not in done.stderr
    return last


def test_seeds_repeat(bundle: Path, tmp_path: Path) -> None:
    images = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run(
            "generate",
            "x",
            "--bundle",
            bundle,
            "--steps",
            2,
            "--seed",
            seed,
            "--out",
            f"{name}.png",
            cwd=tmp_path,
        )
        images.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", 0], "steps"),
        (["--steps", 1001], "steps"),
        (["--width", 70], "width 70"),
        (["--height", 0], "height 0"),
        (["--guidance", -1], "guidance -1.0"),
        (["--guidance", "nan"], "guidance nan"),
        (["--seed", -1], "seed"),
        (["--scheduler", "magic"], "magic"),
        (["--engine", "abacus"], "abacus"),
        (["--device", "TOASTER"], "TOASTER"),
        (["--threads", 0], "0 threads"),
        (["--out", "image.jpg"], "image.jpg"),
    ],
)
def test_values_that_cannot_be_get_one_line(bundle: Path, tmp_path: Path, arguments: list[object], words: str) -> None:
    code = 2 if arguments[0] in ("--scheduler", "--device") else 1  # a choice that does not exist
    assert words in complaint("generate", "x", "--bundle", bundle, *arguments, cwd=tmp_path, code=code)


def test_a_prompt_of_ten_thousand_characters_is_cut_and_said(bundle: Path, tmp_path: Path) -> None:
    done = run("generate", "x " * 5_000, "--bundle", bundle, "--steps", 1, "--out", "x.png", cwd=tmp_path)
    assert "the prompt is longer than the model reads" in done.stderr


def test_generate_takes_the_checkpoints_own_scheduler(own_bundle: Path, tmp_path: Path) -> None:
    def sampler(*options: object) -> str:
        done = run("generate", "x", "--bundle", own_bundle, "--steps", 1, "--out", "x.png", *options, cwd=tmp_path)
        said.append(done.stderr)
        return str(Image.open(tmp_path / "x.png").text["parameters"]).partition("Sampler: ")[2].partition(",")[0]

    said: list[str] = []
    assert (sampler(), sampler("--scheduler", "euler-a")) == ("DDIM", "Euler a")
    manifest = json.loads((own_bundle / "kdc-edge.json").read_text("utf-8"))
    manifest["model"]["scheduler"] |= {"_class_name": "LMSDiscreteScheduler"}
    (own_bundle / "kdc-edge.json").write_text(json.dumps(manifest))
    assert sampler() == "DPM++ 2M"
    assert "the checkpoint's scheduler is LMSDiscreteScheduler" in said[-1]


def test_the_address_of_the_page_can_be_opened() -> None:
    assert page_url("127.0.0.1", 8000, None) == "http://127.0.0.1:8000/"
    assert page_url("::1", 80, "secret") == "http://[::1]:80/#token=secret"


def test_missing_things_are_named(tmp_path: Path) -> None:
    assert "nowhere" in complaint("generate", "x", "--bundle", "nowhere", cwd=tmp_path)
    assert "kdc-edge export" in complaint("bench", cwd=tmp_path)
    assert "kdc-edge train" in complaint("export", cwd=tmp_path)
    assert "nowhere" in complaint("export", "nowhere", cwd=tmp_path)
    (tmp_path / "sd15" / "unet").mkdir(parents=True)
    for name in ("sd15/model_index.json", "sd15/unet/config.json"):
        (tmp_path / name).write_text("{}")
    assert "name the checkpoint's folder, sd15" in complaint("export", "sd15/unet", cwd=tmp_path)
    (tmp_path / "many" / "a").mkdir(parents=True)
    (tmp_path / "many" / "a" / "kdc-edge.json").write_text("{}")
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "model_index.json").write_text("{}")
    for folder, held in (("many", "many/a"), ("run", "run/checkpoint")):
        said = complaint("generate", "x", "--bundle", folder, cwd=tmp_path)
        assert f"{folder} is no bundle: kdc-edge.json is missing; name what it holds, such as {held}" in said
    assert "many/a is a bundle: name the checkpoint that" in complaint("export", "many/a", cwd=tmp_path)
    assert "name its folder, many/a" in complaint("generate", "x", "--bundle", "many/a/kdc-edge.json", cwd=tmp_path)
    assert "int3" in complaint("export", "nowhere", "--precision", "int3", cwd=tmp_path, code=2)
    assert "abacus" in complaint("export", "nowhere", "--target", "abacus", cwd=tmp_path, code=2)
    assert "nowhere" in complaint("train", "--teacher", "nowhere", cwd=tmp_path)
    assert "kdc-9000" in complaint("train", "--student", "kdc-9000", cwd=tmp_path, code=2)
    assert "no run to resume" in complaint("train", "--resume", cwd=tmp_path)
    assert "nowhere.toml" in complaint("bench", "--config", "nowhere.toml", cwd=tmp_path)


def test_an_images_folder_needs_its_kind_which_the_help_shows(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    said = complaint("train", "--task", "a=photos", cwd=tmp_path)
    assert said == "kdc-edge: photos is a folder: write imagefolder:photos for images with captions in it"
    assert "letters, digits" in complaint("train", "--task", "two words=imagefolder:photos", cwd=tmp_path)
    example = shlex.split(EXAMPLES["train"][0])[1:]
    assert "roses is no folder" in complaint(*example, cwd=tmp_path)


def test_a_server_that_cannot_listen_says_why(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", "--port", port, cwd=tmp_path, code=1)
    assert f"127.0.0.1:{port}: Address already in use: choose another" in done.stderr
    assert "ERROR" not in done.stderr
    for token in ("", "a b", "a\nb", "ü"):
        assert "--token is empty, or has characters" in complaint("serve", "--token", token, cwd=tmp_path)


def test_settings_that_do_not_exist_are_named(tmp_path: Path) -> None:
    (tmp_path / "kdc-edge.toml").write_text("[train]\nspeed = 11\n")
    assert "no setting speed" in complaint("train", cwd=tmp_path)
    (tmp_path / "kdc-edge.toml").write_text("[trian]\nsteps = 11\n")
    assert "trian" in complaint("train", cwd=tmp_path)


def test_one_value_of_a_flag_that_may_be_repeated_needs_no_brackets(tmp_path: Path) -> None:
    for text in ('lora = "x.safetensors"', 'lora = ["x.safetensors"]'):
        (tmp_path / "kdc-edge.toml").write_text(f"[generate]\n{text}\n")
        assert "a bundle is fixed: give --vae, --lora" in complaint("generate", "x", cwd=tmp_path)


def test_wrong_usage_is_exit_code_two(tmp_path: Path) -> None:
    for arguments in (["generate"], ["frobnicate"], ["bench", "--stepz", "3"], ["train", "--steps", "many"]):
        assert run(*arguments, cwd=tmp_path, code=2).stdout == ""


def test_verify_names_the_changed_file(own_bundle: Path, tmp_path: Path) -> None:
    path = own_bundle / "unet" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "unet/model.onnx has changed" in run("verify", own_bundle, cwd=tmp_path, code=1).stderr


def test_formats_is_a_document(tmp_path: Path) -> None:
    formats = json.loads(run("formats", "--json", cwd=tmp_path).stdout)
    assert {(f["target"], f["precision"]) for f in formats} >= {("onnx", "fp32"), ("onnx", "fp16")}


@pytest.mark.parametrize("command", [["train"], ["quickstart"], ["init", "--preset", "kdc-482m", "--out", "x"]])
def test_a_missing_package_names_the_extra(tmp_path: Path, command: list[str]) -> None:
    code = f"import sys; sys.modules['torch'] = None; sys.argv = ['kdc-edge', *{command}]\n"
    code += "from kdc_edge.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'kdc-edge[train]'")
    assert list(tmp_path.iterdir()) == []


def test_init_makes_a_checkpoint_that_trains_on(tmp_path: Path) -> None:
    done = run("init", "--preset", "garden-student", "--from", "garden", "--out", "student", cwd=tmp_path)
    assert "up_blocks.3.resnets.1 <- up_blocks.3.resnets.2 (12 tensors)" in done.stderr
    assert "2548340" in run("info", "student", cwd=tmp_path).stdout
    assert "holds other files" in complaint("train", "--teacher", "garden", "--out", tmp_path / "student", cwd=tmp_path)


def test_a_run_that_was_killed_and_then_stopped_goes_on(tmp_path: Path) -> None:
    (tmp_path / "kdc-edge.toml").write_text(
        "[train]\ntask = ['fish=garden:fish']\nsteps = 18\nsave-every = 3\nbatch-size = 2\nsamples = 8\n"
        "eval-images = 2\neval-steps = 2\n"
    )
    run_folder = tmp_path / "runs" / "001"
    _stop(tmp_path, signal.SIGKILL, after_step=4)
    assert not (run_folder / "checkpoint").exists()
    code, said = _stop(tmp_path, signal.SIGTERM, "--resume", after_step=8)
    assert code == 143
    assert "kdc-edge train --resume" in said
    assert not (run_folder / "checkpoint").exists()
    resumed = run("train", "--resume", cwd=tmp_path).stderr
    assert "weights from the saved state, teacher garden-teacher" in resumed
    assert "inherited" not in resumed
    assert "going on after step" in resumed
    log = (run_folder / "metrics.jsonl").read_text("utf-8")
    assert [json.loads(line)["total"] for line in log.splitlines()] == list(range(1, 19))
    assert (run_folder / "checkpoint" / "model_index.json").is_file()
    assert "all 18 steps are done: to go on" in run("train", "--resume", cwd=tmp_path).stderr


def _stop(cwd: Path, how: signal.Signals, *arguments: str, after_step: int) -> tuple[int, str]:
    """Train, send a signal after so many steps: the exit code, and what was said."""
    running = Fork(MAIN, "train", *arguments, cwd=cwd, output=cwd / "train")
    running.wait_for(cwd / "runs" / "001" / "metrics.jsonl", after_step)
    running.send(how)
    return running.wait(), running.err


def test_the_best_bundle_is_the_smallest_of_good_images(
    bundle: Path, bundle_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdc_edge.cli.project import best_bundle

    monkeypatch.chdir(tmp_path)
    for root in (bundle, bundle_fp32):
        shutil.copytree(root, Path("bundles") / root.name)
    assert best_bundle().name == bundle.name  # the smaller one
    manifest = Path("bundles") / bundle.name / "kdc-edge.json"
    found = json.loads(manifest.read_text("utf-8"))
    found["parity"]["checks"][-1]["psnr_db"] = 22.0
    manifest.write_text(json.dumps(found))
    assert best_bundle().name == bundle_fp32.name
    shutil.rmtree(Path("bundles") / bundle_fp32.name)
    assert best_bundle().name == bundle.name  # there is no other


def test_help_is_in_groups_with_examples_and_short_options(tmp_path: Path) -> None:
    text = " ".join(run("generate", "-h", cwd=tmp_path).stdout.split())
    for group in ("Change an image", "Sampling", "Size", "Engine", "Checkpoint"):
        assert f"─ {group} ─" in text
    for part in ("--bundle -b", "--out -o", "--images -n", "[faint]", "[@REVISION]", "Examples: kdc-edge generate"):
        assert part in text


def test_the_shell_completes_commands_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_KDC_EDGE_COMPLETE", "complete_bash")
    for words, position, expected in (("kdc-edge ge", 1, ["generate"]), ("kdc-edge serve --po", 2, ["--port"])):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(position))
        assert run(cwd=tmp_path).stdout.split() == expected
