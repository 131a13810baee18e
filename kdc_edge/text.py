"""How values and foreign texts read, in every message, table and page: one place each.

one_line(error)                     # the first line of another library's exception, printable and short
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


def printable(text: str, limit: int = MAX_LINE_CHARS) -> str:
    """Text from outside on one line: white space folded, control characters as escapes, cut to `limit`."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text.split()))
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


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
