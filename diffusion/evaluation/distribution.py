"""How near a set of images is to the real ones: FID, KID, Inception Score, precision and recall, diversity."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffusion.assets import ASSETS
from diffusion.errors import AntherError
from diffusion.evaluation.inception import Extractor, Features
from diffusion.evaluation.metric import Result
from diffusion.evaluation.nearest import inside, radii
from diffusion.evaluation.reference import NEIGHBOURS, Reference, moments
from diffusion.evaluation.rows import Matrix, parts
from diffusion.images import Images
from diffusion.rng import generator

Array = np.ndarray
Better = Literal["higher", "lower"] | None
FewImages = Literal["refuse", "allow"]

MINIMUM = 50
"""Fewer images than this say little about a distribution; they are refused unless allowed by name."""

SEED = 2020
"""Of the subsets of KID and the order of the Inception Score: torch-fidelity's own."""

VERDICTS: Mapping[str, tuple[Literal["lower", "higher"], float, float]] = {
    "fid": ("lower", 50.0, 20.0),
    "kid": ("lower", 0.05, 0.02),
    "is": ("higher", 3.0, 7.0),
}
"""Seed 004's borders: the better direction, good, excellent."""

DIRECTIONS: Mapping[str, Better] = {
    "fid": "lower",
    "kid": "lower",
    "kid_std": None,
    "is": "higher",
    "is_std": None,
    "precision": "higher",
    "recall": "higher",
}
"""What `distribution_metrics` gives, and in which direction each improves."""

PAIRED = 10_000
"""More images than this are not paired with each other: a seeded choice of so many is."""

_LOGITS = 1024  # Rows in memory at a time.
_GRAM_ROWS = 4096  # The kernel of all pairs of so many images takes 134 MB.


def verdict(metric: str, value: float) -> str | None:
    """Seed 004's word for a value of "fid", "kid" or "is": excellent, good or poor; None for other metrics."""
    if metric not in VERDICTS or not np.isfinite(value):
        return None
    better, good, excellent = VERDICTS[metric]
    sign, word = (1, "below") if better == "lower" else (-1, "above")
    if sign * value < sign * excellent:
        return f"excellent ({word} {excellent:g})"
    if sign * value < sign * good:
        return f"good ({word} {good:g})"
    return f"poor (not {word} {good:g})"


def check_number(generated: int, real: int, few_images: FewImages = "refuse", minimum: int = MINIMUM) -> None:
    """Refuses sets that are too small to be compared; made to be called before hours of sampling.

    Args:
        generated: number of generated images.
        real: number of real ones.
        few_images: "allow" fewer than `minimum`, though never fewer than 2.
        minimum: of the protocol.

    Raises:
        AntherError: too few images.
    """
    if few_images not in ("refuse", "allow"):
        raise AntherError(f'few_images is "refuse" or "allow", not {few_images!r}.')
    if min(generated, real) < 2:
        raise AntherError(
            f"{generated} generated and {real} real images cannot be compared as distributions; give 2 or more of each."
        )
    if min(generated, real) < minimum and few_images == "refuse":
        raise AntherError(
            f"{generated} generated and {real} real images are too few for FID, which below {minimum} measures their "
            "number rather than their quality; give more images, or allow it by name in evaluate.py with "
            "inception.few_images=allow."
        )


def fid(generated: Matrix, mu: Array, sigma: Array) -> float:
    """Fréchet distance of the Gaussians through generated features (N, D) and through the reals.

    FID = |mu_g - mu_r|^2 + tr(sigma_g + sigma_r - 2 (sigma_g sigma_r)^(1/2)), covariances divided by N - 1, in
    float64. Where N is below D the product is singular and its root rounds: by some 1e-4, in torch-fidelity as here.

    Args:
        generated: N of 2 or more.
        mu: (D,) of the reals.
        sigma: (D, D) of the reals.

    Reference: Heusel et al., 2017, arXiv:1706.08500.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    # Not torchmetrics: the root of a singular product rounds by 1e-4 otherwise in torch's eigenvalues than in numpy's,
    # and a FID of 100 or less would no longer equal torch-fidelity's to 1e-6.
    mean, covariance = moments(generated)
    statistics = {"mu": mean, "sigma": covariance}, {"mu": np.asarray(mu), "sigma": np.asarray(sigma)}
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kid(generated: Matrix, real: Matrix, subsets: int = 100, seed: int = SEED) -> tuple[float, float]:
    """Kernel distance: the unbiased squared MMD with k(x, y) = (x . y / D + 1)^3, over random subsets.

    Subsets have min(1000, N, M) images, drawn as torch-fidelity draws them; in float64. Slightly negative values mean
    that no difference was found.

    Args:
        generated: (N, D).
        real: (M, D).
        subsets: number of subsets.
        seed: of the subsets; the global generators are not touched.

    Returns:
        Mean and deviation over the subsets. The deviation says little where subsets are nearly the whole set.

    Reference: Bińkowski et al., 2018, arXiv:1801.01401.
    """
    from torchmetrics.image.kid import maximum_mean_discrepancy, poly_kernel, poly_mmd

    size = subset_size(len(generated), len(real))
    rng = np.random.RandomState(seed)
    draws = [
        (rng.choice(len(generated), size, replace=False), rng.choice(len(real), size, replace=False))
        for _ in range(subsets)
    ]
    if len(generated) + len(real) > _GRAM_ROWS:
        values = [poly_mmd(_float64(real[j]), _float64(generated[i])) for i, j in draws]
    else:
        # Most pairs are in many subsets: the kernel is computed once for all.
        g, r = _float64(generated[:]), _float64(real[:])
        k_gg, k_gr, k_rr = poly_kernel(g, g), poly_kernel(g, r), poly_kernel(r, r)
        values = [
            maximum_mean_discrepancy(k_gg[i][:, i], k_gr[i][:, j], k_rr[j][:, j])
            for i, j in ((torch.from_numpy(i), torch.from_numpy(j)) for i, j in draws)
        ]
    scores = torch.stack(values)
    return float(scores.mean()), float(scores.std(unbiased=False))


def subset_size(generated: int, real: int) -> int:
    """Images per subset of KID."""
    return min(1000, generated, real)


def inception_score(logits: Matrix, splits: int = 10, seed: int = SEED) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))): sure of each image and unsure of the set; 1 at worst, 1008 at best.

    Order and borders of the splits are torch-fidelity's; in float64.

    Args:
        logits: (N, C), N of at least `splits`.
        splits: the score is taken in each of so many parts.
        seed: of the order; the global generators are not touched.

    Returns:
        Mean and deviation over the splits.

    Reference: Salimans et al., 2016, arXiv:1606.03498.
    """
    order = np.random.RandomState(seed).permutation(len(logits))
    borders = [k * len(logits) // splits for k in range(splits + 1)]
    scores = []
    for start, stop in pairwise(borders):
        rows, mean_p, mean_log = order[start:stop], torch.zeros(logits.shape[1], dtype=torch.float64), 0.0
        for part in parts(len(rows), _LOGITS):
            log_p = _float64(logits[rows[part]]).log_softmax(1)
            p = log_p.exp()
            mean_p += p.sum(0) / len(rows)
            mean_log += float((p * log_p).sum()) / len(rows)
        # The mean of KL(p || mean_p) is the mean of sum p log p, less sum mean_p log mean_p: no row is needed twice.
        scores.append(float(np.exp(mean_log - float(torch.xlogy(mean_p, mean_p).sum()))))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    generated: Matrix, real: Matrix, k: int = NEIGHBOURS, real_radii: Array | None = None
) -> tuple[float, float]:
    """Shares of generated images that lie among the reals, and of reals that lie among the generated ones.

    A point lies among others if it is not farther from one of them than the k-th nearest of its own kind.

    Args:
        generated: (N, D), N > k.
        real: (M, D), M > k.
        k: the neighbour that gives the radius.
        real_radii: (M,), where they are known.

    Raises:
        AntherError: k images or fewer on a side.

    Reference: Kynkäänniemi et al., 2019, arXiv:1904.06991.
    """
    precision = inside(generated, real, radii(real, k) if real_radii is None else real_radii).mean()
    recall = inside(real, generated, radii(generated, k)).mean()
    return float(precision), float(recall)


def diversity(images: Images, seed: int = SEED) -> float:
    """Mean L2 distance of random pairs of images in [0, 1], as seed 004 takes it.

    min(100, 2 N) pairs, both drawn with replacement, so that an image may meet itself.

    Args:
        images: uint8 (N, C, H, W).
        seed: of the pairs.
    """
    pairs = torch.randint(len(images), (min(100, 2 * len(images)), 2), generator=generator(seed))
    return float(np.mean([float((images[i].double() - images[j].double()).norm()) / 255 for i, j in pairs.tolist()]))


def diversity_pairs(images: Images) -> float:
    """Mean L2 distance over all pairs i < j of images in [0, 1]; exact, in O(N^2) time.

    Args:
        images: uint8 (N, C, H, W), N of 2 or more.
    """
    n, numbers = len(images), int(np.prod(images.shape[1:]))
    # Files are read once where all of them take 32 MB or less.
    held = list(parts(n, max(1, 2**25 // numbers)))
    total = 0.0
    for k, a in enumerate(held):
        ours = images[a].flatten(1)
        for b in held[k:]:
            theirs = ours if b is a else images[b].flatten(1)
            total += _sum_of_distances(ours, theirs) * (0.5 if b is a else 1.0)
    return total / 255 / (n * (n - 1) / 2)


def _sum_of_distances(a: Tensor, b: Tensor) -> float:
    """Over all pairs of a row of `a` and one of `b`, whole numbers."""
    step = min(1024, max(1, 2**21 // a.shape[1]))
    total = 0.0
    for i in range(0, len(a), step):
        x = a[i : i + step].double()
        # Of a block with itself each distance is there twice, and those of the blocks behind it count twice.
        for j in range(i if a is b else 0, len(b), step):
            y = b[j : j + step].double()
            # Whole numbers below 2^53: exact, also for equal images.
            squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            total += float(squares.sqrt().sum()) * (2.0 if a is b and i != j else 1.0)
    return total


def distribution_metrics(
    generated: Features,
    reference: Reference,
    images: Images,
    extractor: Extractor,
    run_protocol: Mapping[str, Any],
    few_images: FewImages = "refuse",
    minimum: int = MINIMUM,
) -> dict[str, Result]:
    """All metrics of the features of N images, under keys that carry N: `fid_500`, `kid_500`, `kid_std_500`, ….

    Args:
        generated: features of the images.
        reference: the reals, at the size of the images.
        images: uint8 (N, C, H, W), those of `generated`.
        extractor: that of both.
        run_protocol: how the images were made (seeds, guidance, sampler, steps, …): plain values, stored beside the
            metrics' own.
        few_images: see `check_number`.
        minimum: see `check_number`.

    Raises:
        AntherError: too few images, or a reference of another size or extractor.
    """
    n, m = len(generated), len(reference)
    if len(images) != n:
        raise ValueError(f"{len(images)} images for {n} rows of features")
    check_number(n, m, few_images, minimum)
    expected = {**extractor.protocol, "image_shape": list(images.shape[1:])}
    if different := [key for key in expected if expected[key] != reference.protocol.get(key)]:
        raise AntherError(
            "the reference statistics are of other images than those to score: "
            + ", ".join(f"{key} {reference.protocol.get(key)} against {expected[key]}" for key in different)
            + "; compute them with the same extractor from reals of the same size."
        )
    few = f"{min(n, m)} images, fewer than the protocol's {minimum}, allowed by name" if min(n, m) < minimum else ""
    shared = {**reference.record, "N": n}
    results: dict[str, Result] = {}

    def add(name: str, value: float | None, protocol: Mapping[str, Any], note: str = "") -> None:
        results[f"{name}_{n}"] = Result(
            value=value,
            better=DIRECTIONS[name],
            verdict=None if value is None else verdict(name, value),
            note="; ".join(filter(None, (note, few))) or None,
            protocol={**shared, **protocol, **run_protocol},
        )

    dim = extractor.dim
    ranks = {"covariance_rank": min(n - 1, dim), "covariance_rank_real": min(m - 1, dim)}
    singular = f"covariance of rank {n - 1} of {dim}: compare only with the same N" if n < dim else ""
    add("fid", fid(generated.pool, reference.mu, reference.sigma), ranks, singular)

    subsets = {"subsets": 100, "subset_size": subset_size(n, m), "scoring_seed": SEED}
    mean, deviation = kid(generated.pool, reference.features)
    add("kid", mean, subsets)
    add("kid_std", deviation, subsets)

    splits = {"splits": 10, "scoring_seed": SEED, "logits": "unbiased"}
    if generated.logits is None or n < 10:
        why = without_fc(extractor) if generated.logits is None else f"{n} images cannot be split into 10 parts"
        add("is", None, splits, why)
        add("is_std", None, splits, why)
    else:
        mean, deviation = inception_score(generated.logits)
        add("is", mean, splits)
        add("is_std", deviation, splits)

    k = NEIGHBOURS
    if min(n, m) <= k:
        why = f"{min(n, m)} images have no {k} neighbours each"
        add("precision", None, {"neighbours": k}, why)
        add("recall", None, {"neighbours": k}, why)
    else:
        precision, recall = precision_recall(generated.pool, reference.features, k, reference.radii)
        add("precision", precision, {"neighbours": k})
        add("recall", recall, {"neighbours": k})
    return results


def diversity_metrics(images: Images, run_protocol: Mapping[str, Any]) -> dict[str, Result]:
    """The diversity of a set of images, in seed 004's form and over all pairs; needs neither reals nor a network.

    Above 10,000 images the pairs are those of 10,000 of them, and the key says so: `diversity_pairs_10000`.

    Args:
        images: uint8 (N, C, H, W).
        run_protocol: how the images were made, stored beside the metrics' own.
    """
    n = len(images)
    note = "noise has more of it than photographs, so more is not better by itself"
    shared = {"N": n, "distance": "L2 of pixels in [0, 1]", **run_protocol}
    sampled = {**shared, "pairs": min(100, 2 * n), "scoring_seed": SEED}
    results = {f"diversity_{n}": Result(diversity(images), note=note, protocol=sampled)}
    if n > 1:
        paired = images if n <= PAIRED else images[np.random.RandomState(SEED).permutation(n)[:PAIRED]]
        k = len(paired)
        every = {**shared, "N": k, "pairs": k * (k - 1) // 2}
        if k < n:
            every |= {"chosen_from": n, "scoring_seed": SEED}
            note = f"of {k} of the {n} images, drawn with seed {SEED}; {note}"
        results[f"diversity_pairs_{k}"] = Result(diversity_pairs(paired), note=note, protocol=every)
    return results


def without_fc(extractor: Extractor) -> str:
    """Why there is no score of Inception's classes: a note, which is published."""
    full = ASSETS["fid_inception_full"]
    return (
        f"the Inception weights {extractor.weights_hash[:8]} have no fc layer, which this score is made of: put "
        f"{full.urls[0]} at ~/.cache/anther/assets/{full.file}, or below $ANTHER_CACHE where that is set"
    )


def _float64(rows: Array) -> Tensor:
    return torch.from_numpy(np.array(rows, np.float64))
