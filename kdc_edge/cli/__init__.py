"""The command line: one module a command; what is heavy is imported inside the command that needs it.

Data goes to stdout, talk to stderr. Exit codes: 0 done, 1 the work failed (one line says what and what to do),
2 wrong usage, 130 interrupted, 143 terminated. `--debug`, anywhere among the arguments, shows a failure's traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

from kdc_edge.cli.signals import INTERRUPTED, WORDS, Signals

__all__ = ["main"]

OTHER_NAMES = {  # of options in other programs -> here
    "--num-inference-steps": "--steps",
    "--num_inference_steps": "--steps",
    "--cfg": "--guidance",
    "--cfg-scale": "--guidance",
    "--guidance_scale": "--guidance",
    "--sampler": "--scheduler",
    "--num-images": "--images",
}


def main() -> None:
    """Run the command that was typed; whatever ends it becomes one line and an exit code."""
    ends = Signals()
    _replace_closed_streams()
    arguments, debug = _without_debug(sys.argv[1:])
    try:
        ends.listen()  # before the imports, which take their time
        code, line = _run(arguments), None
    except BaseException as error:  # a signal may come as any error: an import that it cuts short fails as it likes
        if debug:
            traceback.print_exc()
        code, line = _outcome(error)
    if ends.code is not None:
        code, line = ends.code, WORDS[ends.code]
    if line is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens
            print(f"kdc-edge: {line}", file=sys.stderr, flush=True)
    ends.restore()
    sys.exit(code)


def _replace_closed_streams() -> None:
    """Let stdin, stdout and stderr that the caller closed be empty ones: else the next file opened has their number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115 (no Path yet)


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments for the command, and whether --debug was among them; what follows `--` is not looked at."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + arguments[end:], len(kept) < end


def _run(arguments: list[str]) -> int:
    """The exit code of a command that ends by itself."""
    from kdc_edge.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # in a test
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if not sys.stderr.isatty():  # nobody watches the bars of a download
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = app(arguments, prog_name="kdc-edge", standalone_mode=False)
    sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _outcome(error: BaseException) -> tuple[int, str | None]:
    """The exit code, and the line to print, of what ended a command."""
    from kdc_edge.errors import explain
    from kdc_edge.text import message

    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, OSError):
        _flush_or_drop()
    if isinstance(cause, BrokenPipeError):
        return 1, "the output was closed before all of it was written"
    if isinstance(error, SystemExit):
        return (error.code if isinstance(error.code, int) else int(error.code is not None)), None
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, WORDS[INTERRUPTED]
    usage = getattr(error, "format_message", None)  # typer's, whatever it is built on
    if usage is None:
        return getattr(error, "exit_code", 1), message(explain(error))
    _suggest_ours(error)
    command = getattr(getattr(error, "ctx", None), "command_path", "kdc-edge")
    words = usage().rstrip(".")
    if command == "kdc-edge generate" and "unexpected extra argument" in words:
        words += ": put quotes around the prompt"
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        return 2, None
    return 2, message(f"{words}: see {command} -h")


def _suggest_ours(error: BaseException) -> None:
    """Let an error about an option of other programs name ours, where the command has it."""
    ours = OTHER_NAMES.get(getattr(error, "option_name", ""))
    parameters = getattr(getattr(getattr(error, "ctx", None), "command", None), "params", ())
    if ours and any(ours in parameter.opts for parameter in parameters):
        error.possibilities = [ours]  # type: ignore[attr-defined]


def _flush_or_drop() -> None:
    """Write what is in stdout's buffer; where that fails, let it go nowhere: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
