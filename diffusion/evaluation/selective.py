"""A classifier that may decline: its decisions, what they are worth at every threshold, and how to choose one."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffusion.errors import AntherError

Array = np.ndarray

IDK = "IDK"
"""The word for "I don't know"."""

SEED_THRESHOLDS = np.linspace(0.1, 0.94, 100)
"""The thresholds that seed 001 tried."""

_TEMPERATURES = (0.05, 20.0)


# Decisions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decisions:
    """What a classifier that may decline says of N images.

    Attributes:
        raw: int64 (N,), the likeliest of all outputs; `digits` is IDK.
        guess: int64 (N,), the likeliest digit, whether it was declined or not.
        confidence: float64 (N,), probability of `raw` after temperature.
        rejection: str (N,): "hard" where `raw` is IDK, "soft" where a digit is below the threshold, else "none".
    """

    raw: Array
    guess: Array
    confidence: Array
    rejection: Array

    @property
    def declined(self) -> Array:
        """Which images were declined at either stage, bool (N,)."""
        result: Array = self.rejection != "none"
        return result

    @property
    def final(self) -> list[str]:
        """The digit of each image, or IDK."""
        return [IDK if declined else str(k) for k, declined in zip(self.guess, self.declined, strict=True)]


def cascade(logits: Array, threshold: float, temperature: float = 1.0, digits: int = 10) -> Decisions:
    """Declines in two stages: where the classifier says IDK itself (hard), and where it is not sure enough (soft).

    Args:
        logits: (N, digits + 1), IDK the last, or (N, digits) of a classifier that has only the soft stage.
        threshold: least confidence that is accepted, 0 to 1.
        temperature: the logits are divided by it.
        digits: number of outputs that are digits.

    Raises:
        AntherError: a threshold that is no probability, or logits of another classifier.
    """
    if not 0 <= threshold <= 1:
        raise AntherError(f"the threshold {threshold} is no probability; choose one between 0 and 1.")
    p = _probabilities(logits, temperature, digits)
    # Of the logits, since small probabilities round to 0, all of them alike.
    raw, guess, confidence = logits.argmax(1), logits[:, :digits].argmax(1), p.max(1)
    rejection = np.where(raw == digits, "hard", np.where(confidence >= threshold, "none", "soft"))
    return Decisions(raw, guess, confidence, rejection)


def predict_with_idk(image: Tensor, model: nn.Module, threshold: float) -> str | int | list[str | int]:
    """Seed 002's task: the class of an image if the softmax of the model is above the threshold, else IDK.

    As the task has it, the probability must exceed the threshold, which `cascade` lets it equal.

    Args:
        image: (C, H, W), or a batch (B, C, H, W), in the model's range.
        model: images -> logits (B, K). Its attribute `digits`, where it has one, says how many outputs are digits; one
            output more is IDK. It runs in evaluation mode, on its own device, and is left as it was.
        threshold: 0 to 1.

    Returns:
        The class, or `IDK`; for a batch a list of those.

    Raises:
        AntherError: no image and no batch, or not of the model's `image_shape`, where it has one.
    """
    shape = getattr(model, "image_shape", None)
    if image.ndim not in (3, 4) or (shape is not None and tuple(image.shape[-3:]) != tuple(shape)):
        expected = ", ".join(map(str, shape or "CHW"))
        raise AntherError(
            f"a tensor of shape {tuple(image.shape)} cannot be classified; give an image ({expected}) or a batch "
            f"(B, {expected})."
        )
    logits = _evaluate(model, image if image.ndim == 4 else image[None])
    outputs: int = logits.shape[-1]
    decided = cascade(logits, threshold, digits=getattr(model, "digits", outputs))
    declined = decided.declined | (decided.confidence <= threshold)
    answers: list[str | int] = [IDK if no else int(k) for k, no in zip(decided.guess, declined, strict=True)]
    return answers if image.ndim == 4 else answers[0]


@torch.no_grad()
def _evaluate(model: nn.Module, images: Tensor) -> Array:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        logits: Array = model(images.to(next(model.parameters(), images).device)).double().cpu().numpy()
    finally:
        # Not model.train(): parts of it may have been frozen.
        for module in training:
            module.training = True
    return logits


def selection_score(logits: Array, temperature: float = 1.0, digits: int = 10) -> Array:
    """The order in which images are accepted, float64 (N,): in that of `cascade`, and total.

    The probability of a digit that is the likeliest output; where IDK is, that of the best digit less 1. So a
    threshold of 0 or more accepts the same images here as in `cascade`, and what IDK declined comes last.

    Args:
        logits: (N, digits + 1), IDK the last, or (N, digits).
        temperature: the logits are divided by it.
        digits: number of outputs that are digits.

    Raises:
        AntherError: logits of another classifier.
    """
    p = _probabilities(logits, temperature, digits)
    best = p[:, :digits].max(1)
    result: Array = np.where(logits.argmax(1) == digits, best - 1, best)
    return result


def _probabilities(logits: Array, temperature: float, digits: int) -> Array:
    if logits.ndim != 2 or logits.shape[1] not in (digits, digits + 1):
        raise AntherError(
            f"logits of shape {logits.shape} are not of a classifier of {digits} digits; give (images, {digits}), or "
            f"(images, {digits + 1}) with IDK."
        )
    if not np.isfinite(logits).all():
        raise AntherError("some logits are not finite; look whether the classifier's weights or images are.")
    if not temperature > 0:
        raise AntherError(f"the temperature {temperature} must be above 0.")
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = np.exp(scaled - scaled.max(1, keepdims=True))
    result: Array = scaled / scaled.sum(1, keepdims=True)
    return result


# Curves ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Risk against coverage, a point for each distinct score, from the greatest threshold to the least.

    Attributes:
        threshold: float64 (P,); a point accepts all scores that are not below it.
        coverage: float64 (P,), share of images that are accepted, above 0 and up to 1.
        risk: float64 (P,), share of the accepted ones that are wrong.
    """

    threshold: Array
    coverage: Array
    risk: Array

    @property
    def accuracy(self) -> Array:
        """Share of the accepted images that are right, (P,)."""
        return 1 - self.risk


def risk_coverage(score: Array, correct: Array) -> Curve:
    """How often a classifier errs when it answers only where its score is highest.

    coverage(t) = #{score >= t} / N, risk(t) = #{score >= t, wrong} / #{score >= t}.

    Args:
        score: (N,), see `selection_score`.
        correct: bool (N,), whether the best digit is the true one.

    Raises:
        AntherError: no images, or scores that are no numbers.

    Reference: Geifman & El-Yaniv, 2017, arXiv:1705.08500.
    """
    threshold, accepted, right = _steps(score, correct)
    return Curve(threshold, accepted / len(score), (accepted - right) / accepted)


def aurc(score: Array, correct: Array) -> float:
    """Area under the risk-coverage curve, 0 to 1: the mean risk of the i surest images over i = 1 … N.

    Among equal scores the expectation over all their orders, so that the order of the images does not count.

    Args:
        score: (N,), see `selection_score`.
        correct: bool (N,), whether the best digit is the true one.

    Raises:
        AntherError: no images, or scores that are no numbers.

    Reference: Geifman, Uziel & El-Yaniv, 2019, arXiv:1805.08206.
    """
    _, accepted, right = _steps(score, correct)
    i = np.arange(1, len(score) + 1)
    # Within a tie the expected number of errors grows by the same amount with every image.
    wrong = np.interp(i, np.append(0, accepted), np.append(0, accepted - right))
    return float((wrong / i).mean())


def e_aurc(score: Array, correct: Array) -> float:
    """The part of AURC that a better score could avoid: AURC less that of the order with all right images first.

    Args:
        score: (N,), see `selection_score`.
        correct: bool (N,), whether the best digit is the true one.

    Raises:
        AntherError: no images, or scores that are no numbers.

    Reference: Geifman, Uziel & El-Yaniv, 2019, arXiv:1805.08206; here with the optimum of N images, which they
    approximate.
    """
    return aurc(score, correct) - aurc(correct, correct)


def _steps(score: Array, correct: Array) -> tuple[Array, Array, Array]:
    """The distinct scores, highest first, and how many images are accepted, and rightly so, from each on."""
    _check(score, correct)
    values, group = np.unique(score, return_inverse=True)
    images = np.bincount(group, minlength=len(values))
    right = np.bincount(group[correct], minlength=len(values))
    return values[::-1].astype(np.float64), images[::-1].cumsum(), right[::-1].cumsum()


def _check(score: Array, correct: Array) -> None:
    if score.ndim != 1 or score.shape != correct.shape or correct.dtype != bool:
        raise ValueError(f"scores of shape {score.shape} for {correct.dtype} of shape {correct.shape}")
    if len(score) == 0:
        raise AntherError("there is no image to judge the classifier by; give a split that has some.")
    if np.isnan(score).any():
        raise AntherError("some scores are not numbers; look whether the classifier's logits are.")


# Calibration ----------------------------------------------------------------------------------------------------------


def calibration_error(confidence: Array, correct: Array, bins: int = 15) -> float:
    """Expected calibration error, 0 to 1: how far the confidence is from the accuracy, in bins of equal width.

    ECE = sum_b n_b / N |accuracy_b - mean confidence_b|, as torchmetrics takes it: with the lower border in the bin,
    and a confidence of exactly 1 in a bin of its own.

    Args:
        confidence: (N,), 0 to 1.
        correct: bool (N,), whether the prediction with that confidence is right.
        bins: number of bins.

    Raises:
        AntherError: no images, or confidences that are no probabilities.

    Reference: Guo et al., 2017, arXiv:1706.04599.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    _check(confidence, correct)
    # torchmetrics would take them for logits.
    if confidence.min() < 0 or confidence.max() > 1:
        raise AntherError("some confidences are no probabilities; give them between 0 and 1.")
    rows = torch.from_numpy(np.array(confidence, np.float64))
    return float(binary_calibration_error(rows, torch.from_numpy(correct.astype(np.int64)), bins, "l1"))


def fit_temperature(logits: Array, labels: Array) -> float:
    """The temperature T that makes softmax(logits / T) likeliest for the labels, 0.05 to 20.

    Above 1 where the classifier is too sure of itself. Where it makes no error, no T is too low for it, and a low one
    is found that says no more than that.

    Args:
        logits: (N, K).
        labels: integers (N,), 0 to K - 1.

    Raises:
        AntherError: no images, logits that are not finite, or labels that the classifier does not have.

    Reference: Guo et al., 2017, arXiv:1706.04599.
    """
    from scipy.optimize import minimize_scalar

    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits of shape {logits.shape} for labels of shape {labels.shape}")
    if len(labels) == 0:
        raise AntherError("there is no image to fit the temperature on; give a split that has some.")
    if not np.isfinite(logits).all():
        raise AntherError("some logits are not finite; look whether the classifier's weights or images are.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise AntherError(
            f"the labels {labels.min()} to {labels.max()} are not all among the {logits.shape[1]} classes of the "
            "classifier; give it the labels that it was trained with."
        )
    rows = torch.from_numpy(np.array(logits, np.float64))
    classes = torch.from_numpy(np.array(labels, np.int64))

    def loss(log_t: float) -> float:
        return float(cross_entropy(rows / np.exp(log_t), classes))

    # In 1 / T the loss is convex, so in log T it has one minimum.
    found = minimize_scalar(loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-7})
    return float(np.exp(found.x))


# Thresholds -----------------------------------------------------------------------------------------------------------


def threshold_for_accuracy(score: Array, correct: Array, target: float) -> float:
    """The least threshold whose accepted images are right often enough, so that it accepts the most of them.

    Args:
        score: (N,) of the calibration split, see `selection_score`.
        correct: bool (N,), whether the best digit is the true one.
        target: least accuracy of the accepted images, 0 to 1.

    Raises:
        AntherError: no threshold reaches the target.
    """
    threshold, accepted, right = _steps(score, correct)
    # Not of the curve: 1 - risk rounds, and 9 of 10 would not reach 0.9.
    accuracy = right / accepted
    reached = accuracy >= target
    if not reached.any():
        best = int(accuracy.argmax())
        raise AntherError(
            f"no threshold reaches an accuracy of {target:g}: the best is {accuracy[best]:.4g}, of {accepted[best]} "
            f"accepted of {len(score)} images; choose a lower target."
        )
    return float(threshold[reached][-1])


def threshold_for_coverage(score: Array, target: float) -> float:
    """The greatest threshold that accepts enough images.

    Args:
        score: (N,) of the calibration split, see `selection_score`.
        target: least share of images that are accepted, 0 to 1.

    Raises:
        AntherError: a target that is no share, or no images.
    """
    if not 0 <= target <= 1:
        raise AntherError(f"a coverage of {target} is no share of the images; choose one between 0 and 1.")
    threshold, accepted, _ = _steps(score, np.ones(len(score), bool))
    return float(threshold[accepted / len(score) >= target][0])


def elbow(curve: Curve) -> float:
    """The threshold where accuracy over coverage is farthest from the chord between the ends of the curve.

    Of equally far points the one with the greatest coverage.
    """
    x, y = curve.coverage - curve.coverage[0], curve.accuracy - curve.accuracy[0]
    # Times the length of the chord, which is the same for all points.
    distance = np.abs(x * y[-1] - y * x[-1])
    return float(curve.threshold[distance == distance.max()][-1])


@dataclass(frozen=True)
class Selective:
    """A classifier at one threshold, with the intervals that its numbers are known to.

    Attributes:
        threshold: least score that is accepted.
        coverage: share of images that are accepted, 0 to 1.
        accuracy: share of the accepted that are right, 0 to 1; None where none is accepted.
        n: number of images.
        accepted: number of those that are accepted.
        coverage_interval: of Clopper and Pearson.
        accuracy_interval: the same; None where none is accepted.
    """

    threshold: float
    coverage: float
    accuracy: float | None
    n: int
    accepted: int
    coverage_interval: tuple[float, float]
    accuracy_interval: tuple[float, float] | None


def report(score: Array, correct: Array, threshold: float, level: float = 0.95) -> Selective:
    """Coverage and accuracy at a threshold, with exact intervals.

    Args:
        score: (N,) of a test split on which the threshold was not chosen, see `selection_score`.
        correct: bool (N,), whether the best digit is the true one.
        threshold: least score that is accepted.
        level: of confidence of the intervals, each for itself.

    Raises:
        AntherError: no images, or scores that are no numbers.

    Reference: Clopper & Pearson, 1934, doi:10.1093/biomet/26.4.404.
    """
    _check(score, correct)
    chosen = score >= threshold
    n, accepted, right = len(score), int(chosen.sum()), int((chosen & correct).sum())
    return Selective(
        threshold=float(threshold),
        coverage=accepted / n,
        accuracy=right / accepted if accepted else None,
        n=n,
        accepted=accepted,
        coverage_interval=_interval(accepted, n, level),
        accuracy_interval=_interval(right, accepted, level) if accepted else None,
    )


def _interval(k: int, n: int, level: float) -> tuple[float, float]:
    from scipy.stats import binomtest

    low, high = binomtest(k, n).proportion_ci(level, method="exact")
    return float(low), float(high)


# Seed 001's variant ---------------------------------------------------------------------------------------------------


def wise_foolish(logits: Array, labels: Array, digits: int = 10, temperature: float = 1.0) -> tuple[Array, Array]:
    """Seed 001's two kinds of images: those on which the classifier is wise, IDK included, and those where it is not.

    Odd, and kept to compare with the seed: IDK is an answer like a digit, with a confidence of its own, so that in
    `seed_curve` images on which the classifier said IDK count as accepted. `risk_coverage` has them declined.

    Args:
        logits: (N, digits + 1), IDK the last, or (N, digits).
        labels: integers (N,), the true digits.
        digits: number of outputs that are digits.
        temperature: the logits are divided by it.

    Returns:
        float64 confidences, the probability of the likeliest output: of the wise (the right digit, or IDK where the
        best digit is wrong) and of the foolish (a wrong digit, or IDK where the best digit is right).

    Raises:
        AntherError: logits of another classifier.
    """
    p = _probabilities(logits, temperature, digits)
    if labels.shape != p.shape[:1]:
        raise ValueError(f"{len(p)} rows of logits for labels of shape {labels.shape}")
    raw, guess, confidence = logits.argmax(1), logits[:, :digits].argmax(1), p.max(1)
    wise = (raw == labels) | ((raw == digits) & (guess != labels))
    return confidence[wise], confidence[~wise]


def seed_curve(wise: Array, foolish: Array, thresholds: Array = SEED_THRESHOLDS) -> tuple[Array, Array]:
    """Seed 001's accuracy and coverage: accuracy(t) = #{wise >= t} / #{all >= t}, coverage(t) = #{all >= t} / N.

    Odd, and kept to compare with the seed: see `wise_foolish`.

    Args:
        wise: confidences, see `wise_foolish`.
        foolish: confidences.
        thresholds: (T,).

    Returns:
        Accuracy (T,), 1 where nothing is left, and coverage (T,).

    Raises:
        AntherError: no images.
    """
    n = len(wise) + len(foolish)
    if n == 0:
        raise AntherError("there is no image to judge the classifier by; give a split that has some.")
    good, bad = (len(part) - np.searchsorted(np.sort(part), thresholds) for part in (wise, foolish))
    left = good + bad
    return np.where(left > 0, good / np.maximum(left, 1), 1.0), left / n


def seed_threshold(wise: Array, foolish: Array, target: float = 0.965, thresholds: Array = SEED_THRESHOLDS) -> float:
    """Seed 001's choice: the least of its thresholds that reaches an accuracy, also where it accepts nothing.

    Odd, and kept to compare with the seed: see `wise_foolish`.

    Args:
        wise: confidences, see `wise_foolish`.
        foolish: confidences.
        target: least accuracy.
        thresholds: (T,), those to choose from.

    Raises:
        AntherError: none of the thresholds reaches it, or no images.
    """
    accuracy, _ = seed_curve(wise, foolish, thresholds)
    reached = accuracy >= target
    if not reached.any():
        raise AntherError(
            f"none of {len(thresholds)} thresholds reaches an accuracy of {target:g}: the best is "
            f"{accuracy.max():.4g}; choose a lower target."
        )
    return float(thresholds[reached].min())
