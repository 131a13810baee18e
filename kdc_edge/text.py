"""How values and foreign texts read, in every message, table and page: one place each.

one_line(error)                     # the first line of another library's exception, printable and short
message(text)                       # a whole line of ours that may quote foreign text
encodable(path.name)                # for a record: JSON has no place for a name that is no UTF-8
megabytes(1_380_000_000)            # "1,380 MB": decimal everywhere
gigabytes(25_769_803_776)           # "25.8 GB"
decibels(None), decibels(41.23)     # "equal", "41.2 dB"
markdown_table(("a", "b"), [(1, 2)])
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_LINE_CHARS = 300
MAX_MESSAGE_CHARS = 480  # of a line that says what was wrong and what to do
COMPUTED = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is a formula to a spreadsheet


def printable(text: str, limit: int = MAX_LINE_CHARS) -> str:
    """Text from outside on one line: white space folded, control characters as escapes, cut to `limit`."""
    shown = visible(" ".join(text.split()))
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def visible(text: str) -> str:
    """Foreign text as it is, but for control characters and escape sequences, which are shown instead of obeyed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def encodable(text: str) -> str:
    """Text as UTF-8 holds it: bytes of a file's name that are none, which Python has as lone surrogates, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def message(text: str) -> str:
    """A line for a person, printable; a longer one loses its middle, because what to do stands at its end."""
    shown = printable(text, len(text) * 10 + 3)  # an escape has ten characters at most
    head, tail = MAX_MESSAGE_CHARS * 2 // 3, MAX_MESSAGE_CHARS // 3 - 5
    return shown if len(shown) <= MAX_MESSAGE_CHARS else f"{shown[:head]} ... {shown[-tail:]}"


def csv_cell(value: object) -> object:
    """A cell for a CSV file: a foreign text that a spreadsheet would compute is quoted by an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(COMPUTED) else value


def one_line(error: BaseException | str, limit: int = MAX_LINE_CHARS) -> str:
    """The first line of an exception's message, or its class where it has none, as part of a line of ours."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0], limit)


def last_line(output: str, default: str) -> str:
    """The last line that a program printed: where Python and most tools say what went wrong."""
    lines = [line for line in output.splitlines() if line.strip()]
    return printable(lines[-1]) if lines else default


def invalid_field(error: ValidationError) -> str:
    """The first fault that pydantic found: "files.unet: Input should be a valid dictionary"."""
    first = error.errors(include_url=False)[0]
    where = printable(".".join(str(part) for part in first["loc"]), 200)
    message = printable(first["msg"], 200)
    return f"{where}: {message}" if where else message


def megabytes(size_bytes: float) -> str:
    """Decimal megabytes: "12.7 MB", "1,380 MB"."""
    size = size_bytes / 1e6
    return f"{size:,.0f} MB" if size >= 100 else f"{size:.1f} MB"


def gigabytes(size_bytes: float) -> str:
    """Decimal gigabytes, for a machine's memory: "25.8 GB"."""
    return f"{size_bytes / 1e9:.1f} GB"


def decibels(psnr_db: float | None) -> str:
    """A PSNR: "41.2 dB"; "equal" for None, and for an infinite one."""
    return "equal" if psnr_db is None or psnr_db == math.inf else f"{psnr_db:.1f} dB"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], *, align: str = "") -> str:
    """A table for Markdown, a line a row; `align` has a letter a column: l, r, or - for the reader's default."""
    rules = {"l": ":--", "r": "--:", "-": "---"}
    dashes = [rules[letter] for letter in align or "-" * len(head)]
    lines = [head, dashes, *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
