"""Find and download published weights by name."""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..atomic import replacing
from .files import check_file

# The authors' storage, whose public access was withdrawn (microsoft/FocalNet#43, #45), and the
# release of the same repository.
STORAGE = "https://projects4jw.blob.core.windows.net/focalnet/release"
RELEASE = "https://github.com/microsoft/FocalNet/releases/download/v1.0.0"
FOCAL_STORAGE = "https://projects4jw.blob.core.windows.net/model/focal-transformer/imagenet1k"


@dataclass(frozen=True, kw_only=True)
class PublishedWeights:
    """One row of the table of weights.

    Attributes:
        variant: name of the backbone.
        file: official file name.
        urls: official addresses, in the order in which they are tried.
        timm, huggingface: repositories on the Hugging Face hub with the same weights, "" for none.
        sha256: published hash, "" for none; no hash has been published so far.
        score: published score, with its metric.
        license: license of the weights.
        source: public file that the row is taken from.
    """

    variant: str
    file: str
    urls: tuple[str, ...]
    score: str
    timm: str = ""
    huggingface: str = ""
    sha256: str = ""
    license: str = "MIT"
    source: str = "microsoft/FocalNet:README.md"


def _classifier(
    variant: str, file: str, score: str, *, timm: str = "", huggingface: str = "", released: bool
) -> PublishedWeights:
    urls = (f"{RELEASE}/{file}",) if released else ()
    return PublishedWeights(
        variant=variant,
        file=file,
        urls=(*urls, f"{STORAGE}/classification/{file}"),
        score=score,
        timm=f"timm/{timm}" if timm else "",
        huggingface=f"microsoft/{huggingface}" if huggingface else "",
    )


def _small(size: str, form: str, top1: float) -> PublishedWeights:
    suffix = "-lrf" if form == "lrf" else ""
    return _classifier(
        f"focalnet_{size}_{form}",
        f"focalnet_{size}_{form}.pth",
        f"ImageNet-1k top-1 {top1}",
        timm=f"focalnet_{size}_{form}.ms_in1k",
        huggingface=f"focalnet-{size}{suffix}",
        released=True,
    )


def _large(size: str, levels: int, file: str) -> PublishedWeights:
    return _classifier(
        f"focalnet_{size}_fl{levels}",
        file,
        "ImageNet-22k, none published",
        timm=f"focalnet_{size}_fl{levels}.ms_in22k",
        huggingface="" if size == "huge" else f"focalnet-{size}-lrf-fl{levels}",
        released=size != "huge",
    )


def _isotropic(size: str, top1: float) -> PublishedWeights:
    return _classifier(
        f"focalnet_{size}_iso",
        f"focalnet_{size}_iso_16.pth",
        f"ImageNet-1k top-1 {top1}",
        released=False,
    )


def _detector(size: str, form: str, schedule: str, box: float, mask: float) -> PublishedWeights:
    file = f"focalnet_{size}_{form}_maskrcnn_{schedule}.pth"
    return PublishedWeights(
        variant=f"focalnet_{size}_{form}",
        file=file,
        urls=(f"{STORAGE}/detection/{file}",),
        score=f"COCO val box AP {box}, mask AP {mask}",
    )


def _focal(size: str, suffix: str, top1: float) -> PublishedWeights:
    file = f"focal-{size}{'-useconv' if suffix else ''}-is224-ws7.pth"
    return PublishedWeights(
        variant=f"focal_{size}{suffix}",
        file=file,
        urls=(f"{FOCAL_STORAGE}/{file}",),
        score=f"ImageNet-1k top-1 {top1}",
        source="microsoft/Focal-Transformer:README.md",
    )


_TOP1 = {
    ("tiny", "srf"): 82.1,
    ("tiny", "lrf"): 82.3,
    ("small", "srf"): 83.4,
    ("small", "lrf"): 83.5,
    ("base", "srf"): 83.7,
    ("base", "lrf"): 83.9,
}
_FOCAL_TOP1 = {
    ("tiny", ""): 82.2,
    ("tiny", "_conv"): 82.7,
    ("small", ""): 83.6,
    ("small", "_conv"): 83.8,
    ("base", ""): 84.0,
    ("base", "_conv"): 84.2,
}
_AP = {
    ("tiny", "srf"): ((45.9, 41.3), (47.6, 42.6)),
    ("tiny", "lrf"): ((46.1, 41.5), (48.0, 42.9)),
    ("small", "srf"): ((48.0, 42.7), (48.9, 43.6)),
    ("small", "lrf"): ((48.3, 43.1), (49.3, 43.8)),
    ("base", "srf"): ((48.8, 43.3), (49.6, 44.1)),
    ("base", "lrf"): ((49.0, 43.5), (49.8, 44.1)),
}

WEIGHTS: dict[str, PublishedWeights] = {
    **{f"focalnet_{size}_{form}.in1k": _small(size, form, t) for (size, form), t in _TOP1.items()},
    **{f"focal_{size}{end}.in1k": _focal(size, end, t) for (size, end), t in _FOCAL_TOP1.items()},
    "focalnet_tiny_iso.in1k": _isotropic("tiny", 74.1),
    "focalnet_small_iso.in1k": _isotropic("small", 80.9),
    "focalnet_base_iso.in1k": _isotropic("base", 82.4),
    "focalnet_large_fl3.in22k": _large("large", 3, "focalnet_large_lrf_384.pth"),
    "focalnet_large_fl4.in22k": _large("large", 4, "focalnet_large_lrf_384_fl4.pth"),
    "focalnet_xlarge_fl3.in22k": _large("xlarge", 3, "focalnet_xlarge_lrf_384.pth"),
    "focalnet_xlarge_fl4.in22k": _large("xlarge", 4, "focalnet_xlarge_lrf_384_fl4.pth"),
    "focalnet_huge_fl3.in22k": _large("huge", 3, "focalnet_huge_lrf_224.pth"),
    "focalnet_huge_fl4.in22k": _large("huge", 4, "focalnet_huge_lrf_224_fl4.pth"),
    **{
        f"focalnet_{size}_{form}.mask_rcnn_{schedule}": _detector(size, form, schedule, *ap)
        for (size, form), both in _AP.items()
        for schedule, ap in zip(("1x", "3x"), both, strict=True)
    },
}


def list_weights() -> list[str]:
    """Return the sorted names of the published weights."""
    return sorted(WEIGHTS)


def weights_folder() -> Path:
    """Return the folder that is searched first and downloaded to.

    It is ``FOCALNET_DET_WEIGHTS``, or ``focalnet_det`` in the user's cache folder.
    """
    cache = os.getenv("XDG_CACHE_HOME") or "~/.cache"
    default = Path(cache) / "focalnet_det"
    return Path(os.getenv("FOCALNET_DET_WEIGHTS") or default).expanduser()


def resolve_weights(weights: str | Path) -> Path:
    """Return the file that a path, URL or registered name stands for; download it if necessary.

    A URL may end in ``#sha256=<hash>``; a file with another hash is refused. Files are cached by
    their whole URL.

    Raises: ValueError if the file cannot be downloaded or has another hash. A path need not exist.
    """
    text = str(weights)
    if re.match(r"(https?|file)://", text):
        url, _, fragment = text.partition("#")
        expected = fragment.removeprefix("sha256=")
        try:
            return _download(url, expected)
        except OSError as error:
            raise ValueError(
                f"Could not download {url}: {error}. Download it another way and pass its path."
            ) from error
    path = Path(text).expanduser()
    if path.exists() or text not in WEIGHTS:
        return path
    row = WEIGHTS[text]
    local = next((p for p in _local_files(row) if p.is_file()), None)
    return local if local is not None else _fetch(text, row)


def _local_files(row: PublishedWeights) -> Iterable[Path]:
    """Yield the paths at which this machine may have the weights, the official file first."""
    yield weights_folder() / row.file
    yield Path(torch.hub.get_dir()) / "checkpoints" / row.file
    hub = os.getenv("HF_HUB_CACHE") or os.getenv("HUGGINGFACE_HUB_CACHE")
    home = os.getenv("HF_HOME") or "~/.cache/huggingface"
    folder = Path(hub or Path(home) / "hub").expanduser()
    for repository in filter(None, (row.timm, row.huggingface)):
        snapshots = folder / f"models--{repository.replace('/', '--')}" / "snapshots"
        for name in ("model.safetensors", "pytorch_model.bin"):
            yield from sorted(snapshots.glob(f"*/{name}"))


def _fetch(name: str, row: PublishedWeights) -> Path:
    failures = []
    for url in row.urls:
        try:
            return _download(url, row.sha256)
        except OSError as error:
            failures.append(f"{url} ({error})")
    mirrors = [f"huggingface.co/{r}" for r in (row.timm, row.huggingface) if r]
    mirror = f" Mirrors: {', '.join(mirrors)}." if mirrors else " No mirror is known."
    raise ValueError(
        f"There is no local file for {name!r}, and no link works: {'; '.join(failures)}.{mirror} "
        f"Download the file to {weights_folder() / row.file}, or pass its path."
    )


def _download(url: str, sha256: str) -> Path:
    """Return the file of a URL from the cache, or download it atomically.

    Raises: OSError if the link is dead or does not give an intact checkpoint, ValueError if the
        file does not have the expected hash.
    """
    target = cached_file(url)
    if not target.is_file():
        try:
            with replacing(target) as temporary:
                torch.hub.download_url_to_file(url, str(temporary))
                _check_download(temporary, url, sha256)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            raise OSError(str(error)) from error
    _check_hash(target, url, sha256)
    return target


def cached_file(url: str) -> Path:
    """Return the path of the cached file of a URL.

    It contains a hash of the URL, because different sites use equal file names.
    """
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    name = Path(urllib.parse.urlsplit(url).path).name or "weights"
    return weights_folder() / "downloads" / key / name


def _check_download(path: Path, url: str, sha256: str) -> None:
    _check_hash(path, url, sha256)
    # A server that hangs up early, or returns an HTML page, does not cause an error before.
    problem = check_file(path)
    if problem is not None:
        raise OSError(f"the download is not an intact checkpoint: {problem}")


def _check_hash(path: Path, url: str, sha256: str) -> None:
    if sha256 and _sha256(path) != sha256.lower():
        actual = _sha256(path)
        advice = f"; remove {path} to download it again" if path == cached_file(url) else ""
        raise ValueError(f"The file of {url} has sha256 {actual}, expected {sha256}{advice}.")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
