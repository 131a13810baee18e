"""mkdocs hooks: the README and its neighbours are pages of the site, and keep their one home.

Links between the files of the repository become links between pages; what is no page stays as plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at pages; drop those to files that the site lacks."""
    uri = page.file.src_uri
    home = {target: source for source, target in PAGES.items()}.get(uri, f"docs/{uri}")
    here = (ROOT / home).parent

    def moved(link: re.Match[str]) -> str:
        text, target = link.groups()
        if "://" in target or target.startswith("#"):
            return link.group()
        path, _, anchor = target.partition("#")
        file = (here / path).resolve().relative_to(ROOT).as_posix()
        found = PAGES.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        if found is None:
            return text
        up = "../" * uri.count("/")
        return f"[{text}]({up}{found}{'#' + anchor if anchor else ''})"

    return LINK.sub(moved, markdown)
