"""The bundle: a folder that a device can run, and the manifest in it that says what it is.

    bundle = Bundle.open(Path("bundles/onnx-fp16"))     # schema, paths and sizes are checked
    bundle.manifest.model.image_size                  # 512
    bundle.check("unet")                                # a component's hashes, as every loading does
    bundle.verify()                                     # every hash; raises BundleError naming the file

The folder keeps diffusers' and optimum's names (unet/model.onnx, tokenizer/vocab.json, model_index.json), so
other tools open it too. `kdc-edge.json` is the manifest. Bundles are untrusted: nothing in a manifest may
name a path outside its folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdc_edge.errors import BundleError
from kdc_edge.files import FileState, file_state, hash_file, inside, recover_folder
from kdc_edge.manifest import MANIFEST, ComponentInfo, Manifest, read_manifest

# The garden's few-step student, which ships; docs/few-steps.md says how it was made.
DEMO_BUNDLE = Path(__file__).parent / "assets" / "demo"
MODEL_INDEX = "model_index.json"  # diffusers' and optimum's; bundles and checkpoints have it
OF_THE_HUB = ("README.md", ".gitattributes")  # a model card and git's settings, in every repository
OF_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")  # file managers leave these in every folder that they show

_UNPROVED: dict[Path, Manifest] = {}


@contextmanager
def unproved(root: Path, manifest: Manifest) -> Iterator[None]:
    """Let this process, and no other, open a bundle whose manifest is not written: it is written when all is proved."""
    _UNPROVED[root] = manifest
    try:
        yield
    finally:
        del _UNPROVED[root]


@dataclass(frozen=True)
class Bundle:
    root: Path
    manifest: Manifest

    @classmethod
    def open(cls, root: Path) -> Bundle:
        """Read a bundle; schema, paths and sizes are checked, hashes are not (see `check` and `verify`)."""
        if root in _UNPROVED:
            return cls(root, _UNPROVED[root])
        recover_folder(root)
        if not root.is_dir():
            raise BundleError(f"no bundle at {root}: make one with kdc-edge export")
        if not (root / MANIFEST).is_file():
            held = [*find_bundles(root), *(p for p in [root / "checkpoint"] if kind_of(p))]  # many bundles, or a run
            remedy = f"name what it holds, such as {held[0]}" if held else "make one with kdc-edge export"
            raise BundleError(f"{root} is no bundle: {MANIFEST} is missing; {remedy}")
        bundle = cls(root, read_manifest(root))
        bundle._check_files()
        return bundle

    def _check_files(self) -> None:
        for name, info in self.manifest.files.items():
            path = inside(self.root, name, BundleError)
            if not path.is_file():
                raise BundleError(f"{path} is missing: the bundle is incomplete; copy or export it again")
            if path.stat().st_size != info.size_bytes:
                raise BundleError(
                    f"{path} has {path.stat().st_size} bytes where {info.size_bytes} are expected:"
                    " the bundle is damaged; copy or export it again"
                )
        for component in self.manifest.components.values():
            for name in component.files:
                if name not in self.manifest.files:
                    raise BundleError(f"{self.root / MANIFEST} is damaged: {name} is used but not listed")

    def verify(self) -> int:
        """Check every hash of every file, and that nothing was added; the number of files. Raises BundleError."""
        self._check_hashes(self.manifest.files)
        self._refuse_unlisted(self.root)
        return len(self.manifest.files)

    def check_hashes(self) -> None:
        """Check the fastest hash of every file that the manifest lists. Raises BundleError."""
        self._check_hashes(self.manifest.files, fastest=True)

    def check(self, part: str) -> dict[str, FileState]:
        """Check a component, or another folder such as "tokenizer", before anything in it is used.

        Each of its files has the fastest hash that the manifest lists for it, and no other file lies among them: an
        engine opens what a network names. Gives their states from before. Raises BundleError.
        """
        before = self.states(part)
        self._check_hashes(before, fastest=True)
        for folder in {self.root / part, *((self.root / name).parent for name in before)}:
            self._refuse_unlisted(folder)
        return before

    def states(self, part: str) -> dict[str, FileState]:
        """By name, what the system tells of a component's files; it differs for a file that was written or replaced."""
        used = [
            name for component, info in self.manifest.components.items() if component == part for name in info.files
        ]
        names = {*used, *(name for name in self.manifest.files if name.startswith(f"{part}/"))}
        return {name: file_state(self.root / name) for name in names}

    def _check_hashes(self, names: Iterable[str], *, fastest: bool = False) -> None:
        for name in sorted(names):
            path, info = self.root / name, self.manifest.files[name]
            listed = info.fastest if fastest else info.hashes
            if hash_file(path, *listed) != listed:
                raise BundleError(f"{path} has changed since it was exported: copy or export it again")

    def _refuse_unlisted(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            ours = name in (MANIFEST, *OF_THE_HUB) or name in self.manifest.files or path.name in OF_SYSTEMS
            if not ours and (path.is_symlink() or not path.is_dir()):
                raise BundleError(f"{path} is not part of the bundle: remove it, or export the bundle again")

    def component(self, name: str) -> tuple[ComponentInfo, Path]:
        """A component's description and the file that an engine opens."""
        for known, info in self.manifest.components.items():
            if known == name:
                return info, inside(self.root, info.files[0], BundleError)
        raise BundleError(f"{self.root} has no {name}: export it again")

    def fingerprint(self, component: str, *also: str) -> str:
        """16 hex digits of a component's files, and of what else decides what an engine makes of them."""
        info, _ = self.component(component)
        parts = [*(self.manifest.files[name].sha256 for name in info.files), *also]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.manifest.files.values())


def kind_of(folder: Path) -> Literal["bundle", "checkpoint"] | None:
    """What a folder holds, by its index files alone; None for neither."""
    if (folder / MANIFEST).is_file() or folder in _UNPROVED:
        return "bundle"
    return "checkpoint" if (folder / MODEL_INDEX).is_file() else None


def find_bundles(folder: Path) -> list[Path]:
    """The bundles that lie in `folder`, in order of name; folders of unfinished exports are hidden and left out."""
    return sorted(p.parent for p in folder.glob(f"*/{MANIFEST}") if not p.parent.name.startswith("."))
