"""FiftyOne Brain's scores of a set of images as formulas on their embeddings, without FiftyOne."""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.evaluation.nearest import euclidean, neighbours
from diffusion.evaluation.rows import Derived, Matrix, parts

Array = NDArray[np.floating]

CLUSTERS = 20
EXACT = 15_000  # up to here Brain computes all distances, above it searches
FITTED, FITTED_ROWS = 2**22, 500
"""k-means sees all embeddings of up to so many numbers or rows, and a seeded choice of so many where there are more."""

SEED = 1234  # Brain's own

_PART = 512  # Rows in memory at a time.

DEFINITIONS = {
    "uniqueness": (
        "FiftyOne Brain on unet_embedding, 1 = most unique: (0.6 d2 + 0.3 d3 + 0.1 d4) / its maximum, where d2, d3, d4 "
        "are the cosine distances of the centred embedding to its second, third and fourth nearest other image. Brain "
        "0.25 leaves out the nearest one, so a single duplicate does not lower the score."
    ),
    "representativeness": (
        "FiftyOne Brain on unet_embedding, and inverted there: 1 = FARTHEST from the centre of its cluster: distance / "
        "the largest one in the cluster, 20 clusters of k-means. Absent where a cluster holds one point only. Without "
        "FiftyOne the centres of more than 2**22 numbers (8,192 images of 512) are those of a seeded choice of them."
    ),
    "representativeness_closeness": (
        "1 = at the centre of its cluster, 0 = the farthest of it: 1 - distance / the largest one in the cluster, with "
        "n // 10 clusters of k-means on unet_embedding, from 1 to 20."
    ),
}


def uniqueness(embeddings: Matrix) -> Array:
    """Brain's uniqueness (N,) in [0, 1]: how far the neighbours of a point are, 1 for the most lonely one.

    u_i = (0.6 d_i2 + 0.3 d_i3 + 0.1 d_i4) / max_j(...), where d_ik is the distance of point i to its k-th nearest other
    point: 1 - cosine of the embeddings, centred on their mean. What fiftyone-brain 0.25.0 computes is kept as it is:
    it removes the point itself and then the nearest neighbour too, so it takes two duplicates of a point to make
    a distance 0; four points have too few neighbours for it, and three or less are all unique.

    Args:
        embeddings: (N, D), a part of them in memory at a time. Above 15,000 rows Brain searches with the distance
            sqrt(2 (1 - cosine)).

    Returns:
        All 1 for N <= 3 and all NaN for N = 4.

    Reference: Voxel51, fiftyone-brain 0.25.0, `internal/core/uniqueness.py`, `internal/core/sklearn.py`.
    """
    from sklearn.preprocessing import normalize

    _check(embeddings)
    n, dim = embeddings.shape
    if n <= 4:
        return np.full(n, 1.0 if n <= 3 else np.nan)
    total = np.zeros((0, dim), np.asarray(embeddings[:0]).dtype)
    for part in parts(n, _PART):
        # Row after row in their own precision, as NumPy does for Brain: its rounding is in the scores' sixth digit.
        total = np.concatenate([total, embeddings[part]]).sum(axis=0, keepdims=True)
    mean = total / n
    directions = Derived(embeddings, lambda rows: normalize(rows - mean), dim)
    nearest = neighbours(directions, 5, _cosine if n <= EXACT else euclidean)[:, 1:]
    weighted = np.mean(nearest[:, 1:] * [0.6, 0.3, 0.1], axis=1)
    scores: Array = weighted / weighted.max()
    return scores


def representativeness(embeddings: Matrix, every: bool = False) -> Array | None:
    """Brain's representativeness (N,) in [0, 1], which is inverted: 1 for the point farthest from its cluster's centre.

    r_i = d_i / max_(j in cluster of i) d_j, d_i = ||e_i - c_i||, with the 20 centres of k-means. The closeness
    1 / (1 + d) that the name promises is computed and dropped in fiftyone-brain 0.25.0, as in later versions;
    `representativeness_closeness` goes in that direction.

    Args:
        embeddings: (N, D).
        every: the centres are those of all rows, as Brain's; else of a seeded choice, where they are more than 500 and
            hold more than 2^22 numbers.

    Returns:
        NaN where all points of a cluster coincide, such as in a cluster of one. None for N < 20: there are no 20
        clusters, and Brain raises.

    Reference: Voxel51, fiftyone-brain 0.25.0, `internal/core/representativeness.py`.
    """
    _check(embeddings)
    if len(embeddings) < CLUSTERS:
        return None
    distances, clusters = _distances_to_centres(embeddings, CLUSTERS, every)
    with np.errstate(invalid="ignore"):
        scores: Array = distances / _largest(distances, clusters)
    return scores


def representativeness_closeness(embeddings: Matrix, every: bool = False) -> Array:
    """How near a point is to the centre of its cluster, (N,) in [0, 1]: 1 at the centre, 0 for the farthest of it.

    1 - d_i / max_(j in cluster of i) d_j, with k = N // 10 clusters of k-means, but at least 1 and at most 20: about
    ten points or more per cluster, so that it says what is typical for the cluster. From N = 200 on the clusters are
    Brain's and the score is 1 minus Brain's representativeness. Points of a cluster that all coincide are at its
    centre.

    Args:
        embeddings: (N, D), N >= 1.
        every: see `representativeness`.
    """
    _check(embeddings)
    if len(embeddings) == 0:
        return np.zeros(0)
    distances, clusters = _distances_to_centres(embeddings, min(max(len(embeddings) // 10, 1), CLUSTERS), every)
    # What rounding leaves between a point and the centre of its copies is no distance.
    longest = max(float(np.linalg.norm(embeddings[part], axis=1).max()) for part in parts(len(embeddings), _PART))
    noise = 8 * np.finfo(distances.dtype).eps * longest
    largest = _largest(distances, clusters)
    scores: Array = np.where(largest <= noise, 1.0, 1.0 - distances / np.maximum(largest, np.finfo(float).tiny))
    return scores


def fits_all(embeddings: Matrix) -> bool:
    """Whether clusters are fitted to all rows anyway."""
    n, dim = embeddings.shape
    return n <= max(FITTED // dim, FITTED_ROWS)


def scores(embeddings: Matrix, every: bool = False) -> dict[str, Array]:
    """The scores of this file by their name in the records; those that N is too small for are left out.

    Args:
        embeddings: (N, D); a part of them is in memory at a time.
        every: see `representativeness`; all of them are in memory for it.
    """
    found = {"uniqueness": uniqueness(embeddings), "representativeness": representativeness(embeddings, every)}
    found["representativeness_closeness"] = representativeness_closeness(embeddings, every)
    return {name: column for name, column in found.items() if column is not None and not np.isnan(column).all()}


def _check(embeddings: Matrix) -> None:
    kind = np.asarray(embeddings[:0]).dtype
    if len(embeddings.shape) != 2 or not np.issubdtype(kind, np.floating):
        raise AntherError(
            f"embeddings must be floats of shape (N, D), not {kind} {embeddings.shape}; flatten each row."
        )
    for part in parts(len(embeddings), _PART):
        finite = np.isfinite(embeddings[part]).all(axis=1)
        if not finite.all():
            row = part.start + int(np.flatnonzero(~finite)[0])
            raise AntherError(f"embeddings must be finite, but row {row} is not; make the embeddings anew.")


def _distances_to_centres(embeddings: Matrix, k: int, every: bool) -> tuple[Array, NDArray[np.integer]]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    n, dim = embeddings.shape
    every = every or fits_all(embeddings)
    most = max(FITTED // dim, FITTED_ROWS)
    seen = embeddings[:] if every else embeddings[np.sort(np.random.default_rng(SEED).permutation(n)[:most])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters
        clusterer = KMeans(n_clusters=k, random_state=SEED).fit(seen)
    distances, clusters = [], []
    for part in parts(n, _PART):
        rows = embeddings[part]
        of_each = clusterer.labels_[part] if every else clusterer.predict(rows)
        distances.append(np.linalg.norm(rows - clusterer.cluster_centers_[of_each], axis=1))
        clusters.append(of_each)
    return np.concatenate(distances), np.concatenate(clusters)


def _cosine(a: Array, b: Array) -> Tensor:
    """1 - cosine of rows of length 1."""
    return (1 - torch.from_numpy(a) @ torch.from_numpy(b).T).clamp_(0, 2)


def _largest(distances: Array, clusters: NDArray[np.integer]) -> Array:
    """The largest distance in the cluster of each point, (N,)."""
    largest = np.zeros(clusters.max() + 1, dtype=distances.dtype)
    np.maximum.at(largest, clusters, distances)
    of_each: Array = largest[clusters]
    return of_each
