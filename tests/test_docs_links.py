"""Every relative link and image of the documentation leads to a file, and to a heading where it names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kdc_edge

ROOT = Path(__file__).parent.parent
FOLDERS = ("*.md", "docs/**/*.md", "examples/*.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for pages in FOLDERS for path in ROOT.glob(pages))
CODE = re.compile(r"^(```|~~~).*?^\1|^ {4}[^\n]*|`[^`\n]+`", re.S | re.M)
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)


def links(text: str) -> list[str]:
    """The relative targets outside code."""
    return [target for target in LINK.findall(CODE.sub("", text)) if "://" not in target]


def anchors(text: str) -> set[str]:
    """The headings as GitHub names them."""
    plain = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.S | re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(plain))
    return {heading.replace(" ", "-") for heading in words}


def broken(page: Path) -> list[str]:
    """The page's links that lead nowhere."""
    found = []
    for target in links(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file.read_text("utf-8"))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken(ROOT / page) == []


def test_every_kind_of_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One, two & three\n")
    page.write_text(
        "# Here\n[a](other.md) [b](other.md#one-two--three) [c](#here) ![d](absent.png) [e](other.md#absent)\n"
        "[f](#absent) [g](https://example.org/absent) `[h](absent.md)`\n"
        "\n    [i](absent.md)\n\n```\n[j](absent.md)\n```\n"
        "[across\nlines](absent.md)\n"
    )
    assert broken(page) == ["absent.png", "other.md#absent", "#absent", "absent.md"]


def test_every_page_is_in_the_sites_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r"(\S+\.md)$", navigation, re.M))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages <= named
    assert named - pages == {"index.md", "contributing.md", "changelog.md", "examples.md"}


def test_the_front_page_says_that_no_full_size_weights_are_published() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "No trained weights of the full-size student" in readme[: len(readme) // 2]


def test_one_version_everywhere() -> None:
    version = kdc_edge.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert newest == version


def test_the_workflow_runs_what_ci_runs() -> None:
    steps = re.findall(r"- run: (.+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert steps == ["bash .ci/run"]
