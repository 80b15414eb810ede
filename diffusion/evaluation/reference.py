"""What Inception says about the real images: computed once, found again by content and protocol."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.assets import cache_dir
from diffusion.errors import AntherError
from diffusion.evaluation.inception import Extractor
from diffusion.evaluation.nearest import radii
from diffusion.evaluation.reals import identity_of
from diffusion.evaluation.rows import Matrix, parts
from diffusion.files import atomic, sha256
from diffusion.images import Images

Array = np.ndarray
log = logging.getLogger(__name__)

NEIGHBOURS = 3  # Of precision, recall and realism, as in their paper.

_VERSION = 2  # Of what is stored and how it is computed.
_CHUNK = 256  # Images whose features are in memory at a time.


@dataclass(frozen=True)
class Reference:
    """The real images of a split, as Inception sees them.

    Attributes:
        features: float32 (N, 2048), row i for image i; a read-only memory map.
        mu: float64 (2048,), the mean.
        sigma: float64 (2048, 2048), the covariance, divided by N - 1.
        radii: float64 (N,), how far the third nearest other image of each is; (0,) of three images or fewer.
        names: one per row: what the data set calls the image.
        digest: of the data set.
        split: its name.
        protocol: that of the extractor, with the `image_shape` (C, H, W) it was given.
    """

    features: Array
    mu: Array
    sigma: Array
    radii: Array
    names: tuple[str, ...]
    digest: str
    split: str
    protocol: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.features)

    @property
    def record(self) -> dict[str, Any]:
        """Which real images, and how they were looked at: plain values for a protocol."""
        return {
            **self.protocol,
            "split": self.split,
            "data_digest": self.digest,
            "N_real": len(self),
            "reals": identity_of(self.digest, self.names),
        }


def reference(pixels: Images, names: Sequence[str], digest: str, split: str, extractor: Extractor) -> Reference:
    """The statistics of real images: from the cache, or computed with a progress bar and stored there.

    The cache is keyed by the images themselves and by everything done to them, so no change of data, split, size,
    weights or preprocessing finds the statistics of another. Broken files are computed again, with a notice. Memory
    does not grow with the number of images.

    Args:
        pixels: uint8 (N, C, H, W), read by parts, at the size of the generated images, not augmented.
        names: one per image.
        digest: of the data set.
        split: its name.
        extractor: see `load_extractor`.

    Raises:
        AntherError: fewer than 2 images, images that the extractor refuses, or a cache that cannot be written.
    """
    if len(pixels) != len(names):
        raise ValueError(f"{len(names)} names for {len(pixels)} images")
    if len(pixels) < 2:
        raise AntherError(f"the split {split!r} has {len(pixels)} images, which have no covariance; choose another.")
    extractor.check(pixels)
    protocol = {**extractor.protocol, "image_shape": list(pixels.shape[1:])}
    folder = cache_dir() / "references" / _key(pixels, names, digest, split, protocol)
    stored = _load(folder, len(pixels), extractor.dim)
    if stored is None:
        if folder.exists():
            log.warning("the reference statistics in %s are incomplete or damaged and are computed again", folder)
        _compute(folder, pixels, f"Inception: {len(pixels)} real images ({split})", extractor)
        stored = _load(folder, len(pixels), extractor.dim)
        if stored is None:
            raise AntherError(f"the statistics just written to {folder} cannot be read back; check the disk.")
    return Reference(*stored, tuple(names), digest, split, protocol)


def _key(pixels: Images, names: Sequence[str], digest: str, split: str, protocol: Mapping[str, Any]) -> str:
    identity = {"version": _VERSION, "digest": digest, "split": split, "names": list(names), **protocol}
    content = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for start in range(0, len(pixels), _CHUNK):
        content.update(pixels[start : start + _CHUNK].contiguous().numpy().data)
    return content.hexdigest()


def _compute(folder: Path, pixels: Images, label: str, extractor: Extractor) -> None:
    n, dim = len(pixels), extractor.dim
    with atomic(folder / "features.npy") as temporary, temporary.open("wb") as file:
        # A writable memory map would kill the process on a full disk.
        header = {"descr": "<f4", "fortran_order": False, "shape": (n, dim)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts(n, _CHUNK, label):
            file.write(extractor.part_features(pixels[part]).pool[:].data)
    features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    mu, sigma = moments(features)
    balls = radii(features, NEIGHBOURS) if n > NEIGHBOURS else np.zeros(0)
    for name, array in (("mu", mu), ("sigma", sigma), ("radii", balls)):
        with atomic(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)
    # Last, so that arrays without it are not believed.
    with atomic(folder / "files.json") as temporary:
        temporary.write_text(json.dumps({name: sha256(folder / name) for name in _FILES}, indent=1))


_FILES = ("features.npy", "mu.npy", "sigma.npy", "radii.npy")


def _load(folder: Path, n: int, dim: int) -> tuple[Array, Array, Array, Array] | None:
    try:
        digests = json.loads((folder / "files.json").read_text())
        if any(sha256(folder / name) != digests[name] for name in _FILES):
            return None
        features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
        mu, sigma, balls = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("mu", "sigma", "radii"))
    except (OSError, ValueError, KeyError, EOFError, TypeError):
        return None
    return (features, mu, sigma, balls) if (features.shape, sigma.shape) == ((n, dim), (dim, dim)) else None


def moments(features: Matrix) -> tuple[Array, Array]:
    """Mean (D,) and covariance (D, D), divided by N - 1, of features (N, D) in float64, by chunks."""
    n, dim = features.shape
    mu = sum((np.asarray(features[k : k + _CHUNK], np.float64).sum(0) for k in range(0, n, _CHUNK)), np.zeros(dim)) / n
    scatter = torch.zeros(dim, dim, dtype=torch.float64)
    for k in range(0, n, _CHUNK):
        centred = torch.from_numpy(features[k : k + _CHUNK].astype(np.float64) - mu)
        scatter.addmm_(centred.T, centred)
    return mu, scatter.numpy() / (n - 1)
