"""Images by themselves: the nearest real one, how real they look, how sure a classifier is."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import AntherError

Array = np.ndarray

_BLOCK = 2**20  # Numbers of one side in memory at a time: 512 rows of 2048.


def nearest(features: Array, reference_features: Array) -> tuple[Array, Array]:
    """The nearest real image of each image: the memorisation check, where the reals are the training images.

    Args:
        features: (N, D) of the images, from any network.
        reference_features: (M, D) of the reals, from the same one; may be a memory map.

    Returns:
        float64 (N,) distances in L2, 0 for a copy, and int64 (N,) rows of the reference.

    Raises:
        AntherError: features of different networks, or none.
    """
    _check(features, reference_features)
    distances, rows = np.empty(len(features)), np.empty(len(features), np.int64)
    for part, blocks in _blocks(features, reference_features):
        best = torch.full((part.stop - part.start,), torch.inf, dtype=torch.float64)
        row = torch.zeros(len(best), dtype=torch.int64)
        for others, d in blocks:
            value, index = d.min(1)
            row = torch.where(value < best, index + others.start, row)
            best = torch.minimum(best, value)
        rows[part] = row.numpy()
        # Distances by a matrix product round near 0, where copies are; the one that counts is taken again.
        found = np.asarray(reference_features)[rows[part]]
        distances[part] = np.linalg.norm(features[part].astype(np.float64) - found, axis=1)
    return distances, rows


def radii(features: Array, k: int = 3) -> Array:
    """Distances (N,) of each row of (N, D) to its k-th nearest other row.

    Raises:
        AntherError: fewer than k + 1 rows.
    """
    _check(features, features)
    if len(features) <= k:
        raise AntherError(f"{len(features)} images have no {k} neighbours each; give at least {k + 1}.")
    result = np.empty(len(features))
    for part, blocks in _blocks(features, features):
        # k + 1 of them, since each row is its own nearest.
        best = torch.full((part.stop - part.start, k + 1), torch.inf, dtype=torch.float64)
        for _, d in blocks:
            best = torch.cat([best, d], 1).topk(k + 1, largest=False).values
        result[part] = best[:, k].numpy()
    return result


def inside(features: Array, centres: Array, balls: Array) -> Array:
    """Which rows of (N, D) lie in at least one of the balls around `centres` (M, D) with the radii `balls` (M,)."""
    _check(features, centres)
    result = np.empty(len(features), bool)
    limit = torch.from_numpy(balls)
    for part, blocks in _blocks(features, centres):
        hit = torch.zeros(part.stop - part.start, dtype=torch.bool)
        for others, d in blocks:
            hit |= (d <= limit[others]).any(1)
        result[part] = hit.numpy()
    return result


def realism(features: Array, reference_features: Array, k: int = 3) -> Array:
    """How deep each image lies among the reals, (N,): 1 or more inside their manifold.

    R(g) = max_r radius_k(r) / |g - r| over the reals r whose radius is not above the median; distances below 1e-5
    count as 1e-5, so that copies have a number.

    Args:
        features: (N, D) of the images, from any network.
        reference_features: (M, D) of the reals, M > k.
        k: the neighbour that gives the radius of a real.

    Raises:
        AntherError: too few reals, or features of different networks.

    Reference: Kynkäänniemi et al., 2019, arXiv:1904.06991, equation 3.
    """
    _check(features, reference_features)
    balls = radii(reference_features, k)
    limit = torch.from_numpy(np.where(balls <= np.median(balls), balls, 0.0))
    result = np.empty(len(features))
    for part, blocks in _blocks(features, reference_features):
        best = torch.zeros(part.stop - part.start, dtype=torch.float64)
        for others, d in blocks:
            best = torch.maximum(best, (limit[others] / d.clamp_min(1e-5)).amax(1))
        result[part] = best.numpy()
    return result


def entropy(logits: Array) -> Array:
    """Entropy (N,) of softmax(logits) in nats, from 0 (sure of one class) to log C, for logits (N, C)."""
    log_p = torch.from_numpy(np.asarray(logits, np.float64)).log_softmax(1)
    result: Array = -(log_p.exp() * log_p).sum(1).numpy()
    return result


def _check(features: Array, reference_features: Array) -> None:
    if features.ndim != 2 or reference_features.ndim != 2 or features.shape[1] != reference_features.shape[1]:
        raise AntherError(
            f"features of shape {features.shape} and {reference_features.shape} are not of one network; both must be "
            "(images, numbers) from the same extractor."
        )
    if len(reference_features) == 0:
        raise AntherError("there is no real image to compare with; give a reference with images.")


def _blocks(a: Array, b: Array) -> Iterator[tuple[slice, Iterator[tuple[slice, Tensor]]]]:
    """Distances of all rows of `a` to all of `b`, float64, by parts that do not grow with either."""
    step = min(1024, max(1, _BLOCK // a.shape[1]))

    def against(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part in _parts(len(b), 4 * step):
            yield part, torch.cdist(rows, _float64(b[part]), compute_mode="use_mm_for_euclid_dist")

    for part in _parts(len(a), step):
        yield part, against(_float64(a[part]))


def _parts(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _float64(rows: Array) -> Tensor:
    return torch.from_numpy(np.asarray(rows, np.float64))
