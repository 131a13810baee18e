"""Distances between sets of images, and what needs other people's weights: FID, KID, CLIP score, LPIPS.

    metrics = ImageMetrics(Path("weights"))
    metrics.missing()                     # one line for each file that is not there: what to fetch, where to put it
    metrics.measure(images, references, prompts, paired)

Nothing is fetched: the files lie in `weights`, or in torch's and the hub's own caches. The Inception network reads
its file by `weights_only`, so that no pickled code runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdc_edge.errors import InputError, require
from kdc_edge.quiet import quiet

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
ALEXNET = "alexnet-owt-7be5be79.pth"
CLIP = "openai/clip-vit-base-patch16"
NETWORKS = {  # whose features a metric is made of
    "fid": f"Inception v3 ({INCEPTION})",
    "kid": f"Inception v3 ({INCEPTION})",
    "clip_score": CLIP,
    "lpips": f"AlexNet ({ALEXNET})",
}
MIN_FID_IMAGES = 64  # fewer say nothing: KID is for small sets


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between normal distributions fitted to features (N, d) and (M, d); lower is nearer (Heusel et al. 2017)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    spread = [np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b)]
    # tr((Sa Sb)^1/2): the eigenvalues of a product of two covariances are real and not negative
    roots = np.sqrt(np.linalg.eigvals(spread[0] @ spread[1]).real.clip(min=0))
    mean = a.mean(0) - b.mean(0)
    return float(mean @ mean + np.trace(spread[0]) + np.trace(spread[1]) - 2 * roots.sum())


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 of features (N, d), (M, d) (Binkowski et al. 2018)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m, d = len(a), len(b), a.shape[1]
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


def kernel_distance_error(a: np.ndarray, b: np.ndarray) -> float:
    """Standard error of `kernel_distance` of features (N, d), (M, d): the jackknife over both sets (Efron 1981)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    n, m, d = len(a), len(b), a.shape[1]
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    variance = 0.0
    for count, within, across, others in ((n, aa, ab, m), (m, bb, ab.T, n)):
        if count < 3:
            return math.nan
        rows = within.sum(1) - np.diag(within)  # what leaves with each sample, once a side
        left = (rows.sum() - 2 * rows) / ((count - 1) * (count - 2))
        left -= 2 * (across.sum() - across.sum(1)) / ((count - 1) * others)
        variance += (count - 1) / count * float(((left - left.mean()) ** 2).sum())
    return math.sqrt(variance)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of values (N,)."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


class ImageMetrics:
    """The metrics whose weight files are here."""

    def __init__(self, weights: Path | None = None, device: torch.device | str = "cpu") -> None:
        if weights is not None and not weights.is_dir():
            raise InputError(f"--metric-weights {weights} is no folder: name the one that holds the weight files")
        self.weights, self.device = weights, torch.device(device)

    def missing(self) -> list[str]:
        """For each weight file that is not here: which metric needs it, what to fetch and where to put it."""
        place = self.weights or Path(torch.hub.get_dir()) / "checkpoints"
        lines = []
        if self._find(INCEPTION) is None:
            lines.append(f"FID and KID need {INCEPTION}: fetch it from torch-fidelity's release v0.2.0 into {place}")
        if self._find(ALEXNET) is None:
            lines.append(f"LPIPS needs {ALEXNET}: fetch it from torchvision's model downloads into {place}")
        if self._clip_folder is None:
            lines.append(
                f"the CLIP score needs {CLIP}: have it in the hub's cache,"
                f" or as the folder {(self.weights or Path('DIR')) / CLIP.split('/')[1]} with --metric-weights"
            )
        return lines

    def measure(
        self,
        images: np.ndarray,
        references: np.ndarray | None,
        prompts: Sequence[str],
        paired: np.ndarray | None = None,
        errors: dict[str, float] | None = None,
        each: dict[str, np.ndarray] | None = None,
    ) -> dict[str, float]:
        """What can be measured of uint8 images (N, H, W, 3); `errors` receives standard errors where there are any,
        `each` the values (N,) of metrics that single images have.

        fid, kid: to `references` (M, H, W, 3). clip_score: to the prompts. lpips: to `paired`, the teacher's images
        from the same prompts and noise.
        """
        found: dict[str, float] = {}
        errors = {} if errors is None else errors
        each = {} if each is None else each
        if references is not None and min(len(images), len(references)) > 1 and self._find(INCEPTION):
            ours, theirs = self.inception_features(images), self.inception_features(references)
            found["kid"], errors["kid"] = kernel_distance(ours, theirs), kernel_distance_error(ours, theirs)
            if min(len(images), len(references)) >= MIN_FID_IMAGES:
                found["fid"] = frechet_distance(ours, theirs)
        if self._clip_folder is not None:
            scores = each["clip_score"] = self.clip_scores(images, prompts)
            found["clip_score"], errors["clip_score"] = float(scores.mean()), standard_error(scores)
        if paired is not None and self._find(ALEXNET):
            distances = each["lpips"] = self.lpips_distances(images, paired)
            found["lpips"], errors["lpips"] = float(distances.mean()), standard_error(distances)
        return found

    def measurable(self, images: int) -> set[str]:
        """The names of what `measure` finds of so many images."""
        found = {"clip_score"} if self.has_clip else set()
        if self.has_lpips:
            found.add("lpips")
        if self._find(INCEPTION) is not None:
            found |= {"kid", "fid"} if images >= MIN_FID_IMAGES else {"kid"}
        return found

    @property
    def has_lpips(self) -> bool:
        return self._find(ALEXNET) is not None

    @property
    def has_clip(self) -> bool:
        return self._clip_folder is not None

    def _find(self, name: str) -> Path | None:
        places = [p for p in (self.weights, Path(torch.hub.get_dir()) / "checkpoints") if p is not None]
        return next((p / name for p in places if (p / name).is_file()), None)

    @cached_property
    def _clip_folder(self) -> Path | None:
        local = self.weights / CLIP.split("/")[1] if self.weights else None
        if local is not None and (local / "config.json").is_file():
            return local
        hub = require("huggingface_hub", extra="eval", purpose="the CLIP score")
        try:
            return Path(hub.snapshot_download(CLIP, local_files_only=True))
        except Exception:  # not in the cache
            return None

    @cached_property
    def _inception(self) -> Any:
        path = self._find(INCEPTION)
        fidelity = require("torch_fidelity.feature_extractor_inceptionv3", extra="eval", purpose="FID and KID")
        try:
            torch.load(str(path), map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
            network = fidelity.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
        except Exception as error:
            raise InputError(f"{path} holds no Inception weights: {str(error)[:100]}; fetch it again") from None
        return network.eval().to(self.device)

    @torch.inference_mode()
    def inception_features(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, 3) -> float32 (N, 2048)."""
        batches = torch.split(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), 16)
        return np.concatenate([self._inception(b.to(self.device))[0].float().cpu().numpy() for b in batches])

    @cached_property
    def _clip(self) -> tuple[Any, Any]:
        transformers = require("transformers", extra="eval", purpose="the CLIP score")
        folder = self._clip_folder
        try:
            with quiet():
                model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
                processor = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise InputError(f"{folder} holds no CLIP as safetensors: {str(error)[:100]}; fetch it again") from None
        return model.eval().to(self.device), processor

    def clip_score(self, images: np.ndarray, prompts: Sequence[str]) -> float:
        """The mean of `clip_scores`."""
        return float(self.clip_scores(images, prompts).mean())

    @torch.inference_mode()
    def clip_scores(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """100 * max(cosine, 0) of each image and its prompt, (N,) (Hessel et al., arXiv 2104.08718).

        torchmetrics 1.9 computes the same, but not with transformers 5, whose features come in an object.
        """
        model, processor = self._clip
        cosines = []
        for image, prompt in zip(images, prompts, strict=True):
            inputs = processor(text=[prompt], images=[image], return_tensors="pt", truncation=True, max_length=77)
            seen = model(**inputs.to(self.device))
            cosines.append(torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds))
        found: np.ndarray = (100 * torch.cat(cosines).clamp(min=0)).cpu().numpy()
        return found

    @cached_property
    def lpips_network(self) -> Any:
        """Image pairs (N, 3, H, W) in [-1, 1] -> LPIPS (N, 1, 1, 1), with a gradient; its weights are frozen."""
        lpips = require("torchmetrics.functional.image.lpips", extra="eval", purpose="LPIPS")
        with torch.inference_mode(False):  # a gradient may be asked for later
            return _alexnet_lpips(lpips, self._find(ALEXNET)).requires_grad_(False).to(self.device)

    def lpips(self, images: np.ndarray, others: np.ndarray) -> float:
        """The mean of `lpips_distances`."""
        return float(self.lpips_distances(images, others).mean())

    @torch.inference_mode()
    def lpips_distances(self, images: np.ndarray, others: np.ndarray) -> np.ndarray:
        """LPIPS of image pairs by AlexNet, (N,) (Zhang et al., arXiv 1801.03924)."""
        network = self.lpips_network
        a, b = (
            torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float() / 127.5 - 1 for x in (images, others)
        )
        pairs = zip(torch.split(a, 16), torch.split(b, 16), strict=True)
        distances = [network(x.to(self.device), y.to(self.device)).flatten() for x, y in pairs]
        found: np.ndarray = torch.cat(distances).cpu().numpy()
        return found


def _alexnet_lpips(lpips: Any, path: Path | None) -> Any:
    """The published linear weights, which torchmetrics carries, on AlexNet's features from a local file."""
    network = lpips._LPIPS(pretrained=True, net="alex", pnet_rand=True, use_dropout=True, eval_mode=True)
    weights: Mapping[str, torch.Tensor] = torch.load(str(path), map_location="cpu", weights_only=True)
    mine = dict(network.net.named_parameters())
    for name, parameter in mine.items():  # slice2.3.weight <- features.3.weight
        source = f"features.{name.split('.', 1)[1]}"
        parameter.data.copy_(weights[source])
    return network.eval()
