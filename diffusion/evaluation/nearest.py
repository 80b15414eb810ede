"""Images by themselves: the nearest real one, how real they look, how sure a classifier is."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.evaluation.rows import Matrix, parts

Array = np.ndarray

_BLOCK = 2**20  # Numbers of one side in memory at a time: 512 rows of 2048.


def nearest(features: Matrix, reference_features: Matrix) -> tuple[Array, Array]:
    """The nearest real image of each image: the memorisation check, where the reals are the training images.

    Args:
        features: (N, D) of the images, from any network.
        reference_features: (M, D) of the reals, from the same one.

    Returns:
        float64 (N,) distances in L2, 0 for a copy, and int64 (N,) rows of the reference.

    Raises:
        AntherError: features of different networks, or none.
    """
    _check(features, reference_features)
    distances, rows = np.empty(len(features)), np.empty(len(features), np.int64)
    for part, own, blocks in _blocks(features, reference_features):
        best = torch.full((len(own),), torch.inf, dtype=torch.float64)
        row = torch.zeros(len(best), dtype=torch.int64)
        for others, d in blocks:
            value, index = d.min(1)
            row = torch.where(value < best, index + others.start, row)
            best = torch.minimum(best, value)
        rows[part] = row.numpy()
        # Distances by a matrix product round near 0, where copies are; the one that counts is taken again.
        distances[part] = np.linalg.norm(own.numpy() - reference_features[rows[part]], axis=1)
    return distances, rows


def radii(features: Matrix, k: int = 3) -> Array:
    """Distances (N,) of each row of (N, D) to its k-th nearest other row.

    Raises:
        AntherError: fewer than k + 1 rows.
    """
    if len(features) <= k:
        raise AntherError(f"{len(features)} images have no {k} neighbours each; give at least {k + 1}.")
    # k + 1 of them, since each row is its own nearest.
    return neighbours(features, k + 1)[:, k].copy()


def euclidean(a: Array, b: Array) -> Tensor:
    """Distances (n, m) of rows (n, D) and (m, D), float64."""
    return torch.cdist(_float64(a), _float64(b), compute_mode="use_mm_for_euclid_dist")


def neighbours(features: Matrix, k: int, distances: Callable[[Array, Array], Tensor] = euclidean) -> Array:
    """Distances (N, k) of each row of (N, D) to the k nearest rows, itself included, the smallest first.

    Args:
        features: N of at least k.
        k: how many.
        distances: (n, D), (m, D) -> (n, m), symmetric.
    """
    _check(features, features)
    n = len(features)
    best = torch.full((n, k), torch.inf, dtype=torch.float64)
    blocks = list(parts(n, _step(features)))
    for number, part in enumerate(blocks):
        own = features[part]
        for others in blocks[number:]:
            d = distances(own, own if others is part else features[others]).double()
            # The distance of two rows counts for both, so a pair of blocks is seen once.
            best[part] = torch.cat([best[part], d], 1).topk(k, largest=False).values
            if others is not part:
                best[others] = torch.cat([best[others], d.T], 1).topk(k, largest=False).values
    found: Array = best.numpy()
    return found


def inside(features: Matrix, centres: Matrix, balls: Array) -> Array:
    """Which rows of (N, D) lie in at least one of the balls around `centres` (M, D) with the radii `balls` (M,)."""
    _check(features, centres)
    result = np.empty(len(features), bool)
    limit = torch.from_numpy(balls)
    for part, own, blocks in _blocks(features, centres):
        hit = torch.zeros(len(own), dtype=torch.bool)
        for others, d in blocks:
            hit |= (d <= limit[others]).any(1)
        result[part] = hit.numpy()
    return result


def realism(features: Matrix, reference_features: Matrix, balls: Array) -> Array:
    """How deep each image lies among the reals, (N,): 1 or more inside their manifold.

    R(g) = max_r radius(r) / |g - r| over the reals r whose radius is not above the median; distances below 1e-5
    count as 1e-5, so that copies have a number.

    Args:
        features: (N, D) of the images, from any network.
        reference_features: (M, D) of the reals.
        balls: (M,), `radii` of the reals; those of the paper reach the third neighbour.

    Raises:
        AntherError: features of different networks.

    Reference: Kynkäänniemi et al., 2019, arXiv:1904.06991, equation 3.
    """
    _check(features, reference_features)
    limit = torch.from_numpy(np.where(balls <= np.median(balls), balls, 0.0))
    result = np.empty(len(features))
    for part, own, blocks in _blocks(features, reference_features):
        best = torch.zeros(len(own), dtype=torch.float64)
        for others, d in blocks:
            best = torch.maximum(best, (limit[others] / d.clamp_min(1e-5)).amax(1))
        result[part] = best.numpy()
    return result


def entropy(logits: Matrix) -> Array:
    """Entropy (N,) of softmax(logits) in nats, from 0 (sure of one class) to log C, for logits (N, C)."""
    result = np.empty(len(logits))
    for part in parts(len(logits), _step(logits)):
        log_p = _float64(logits[part]).log_softmax(1)
        result[part] = -(log_p.exp() * log_p).sum(1).numpy()
    return result


def _check(features: Matrix, reference_features: Matrix) -> None:
    ours, theirs = features.shape, reference_features.shape
    if len(ours) != 2 or len(theirs) != 2 or ours[1] != theirs[1]:
        raise AntherError(
            f"features of shape {ours} and {theirs} are not of one network; both must be (images, numbers) from the "
            "same extractor."
        )
    if len(reference_features) == 0:
        raise AntherError("there is no real image to compare with; give a reference with images.")


def _blocks(a: Matrix, b: Matrix) -> Iterator[tuple[slice, Tensor, Iterator[tuple[slice, Tensor]]]]:
    """Rows of `a` and their distances to all of `b`, float64, by parts that do not grow with either."""
    step = _step(a)

    def against(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for part in parts(len(b), 4 * step):
            yield part, euclidean(rows.numpy(), b[part])

    for part in parts(len(a), step):
        rows = _float64(a[part])
        yield part, rows, against(rows)


def _step(rows: Matrix) -> int:
    return min(1024, max(1, _BLOCK // rows.shape[1]))


def _float64(rows: Array) -> Tensor:
    return torch.from_numpy(np.asarray(rows, np.float64))
