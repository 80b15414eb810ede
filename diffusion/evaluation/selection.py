"""What a classifier is worth that may decline: fitted on the calibration split, reported on the test split."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffusion.errors import AntherError
from diffusion.evaluation import selective
from diffusion.evaluation.selective_plots import draw_confusions, draw_reliability, draw_selective
from diffusion.files import atomic

Array = np.ndarray
Rule = Literal["accuracy", "coverage", "elbow"]
SEED_TARGET = 0.965


@dataclass(frozen=True)
class Judged:
    """What a classifier said of the images of a split.

    Attributes:
        logits: float64 (N, K).
        labels: int64 (N,), 0 to K - 1: what the network was trained to say, IDK included.
        digits: int64 (N,): what the images really are.
    """

    logits: Array
    labels: Array
    digits: Array


def fit_threshold(score: Array, correct: Array, rule: Rule, target: float | None) -> float:
    """The threshold that a rule chooses on a calibration split, 0 to 1.

    Args:
        score: see `selective.selection_score`.
        correct: whether the best digit is right, bool (N,).
        rule: least threshold that reaches an accuracy, greatest that keeps a coverage, or the elbow of the curve.
        target: the accuracy or coverage; None with elbow.

    Raises:
        AntherError: no such rule, or a target that is missing or out of reach.
    """
    if rule == "elbow":
        threshold = selective.elbow(selective.risk_coverage(score, correct))
    elif target is None or rule not in ("accuracy", "coverage"):
        raise AntherError(
            f"the rule {rule!r} with the target {target}: choose accuracy or coverage with one, or elbow."
        )
    elif rule == "accuracy":
        threshold = selective.threshold_for_accuracy(score, correct, target)
    else:
        threshold = selective.threshold_for_coverage(score, target)
    # Below 0 are the digits that the network calls IDK itself: no threshold accepts those.
    return max(0.0, threshold)


def assess(
    calibration: Judged,
    test: Judged,
    digits: int,
    rule: Rule,
    target: float | None,
    folder: Path,
) -> dict[str, Any]:
    """Fits temperature and threshold on one split, reports on the other, draws `plots/`, writes `selective.json`.

    Args:
        calibration: the images that temperature and threshold are fitted on.
        test: images that nothing was fitted on.
        digits: number of outputs that are digits; an output more is IDK.
        rule: see `fit_threshold`.
        target: see `fit_threshold`.
        folder: of the run.

    Returns:
        What was written: plain values.
    """
    temperature = selective.fit_temperature(calibration.logits, calibration.labels)
    score, right = _ordered(calibration, temperature, digits)
    threshold = fit_threshold(score, right, rule, target)
    elbow = fit_threshold(score, right, "elbow", None)

    score, right = _ordered(test, temperature, digits)
    chosen = selective.report(score, right, threshold)
    decisions = selective.cascade(test.logits, threshold, temperature, digits)
    as_labelled = test.logits.argmax(1) == test.labels
    before = selective.cascade(test.logits, threshold, 1.0, digits).confidence
    wise, foolish = selective.wise_foolish(test.logits, test.digits, digits)
    found = {
        "accuracy": float(right.mean()),
        "n_calibration": len(calibration.digits),
        "n_test": len(test.digits),
        "temperature": temperature,
        "calibration_error_before": selective.calibration_error(before, as_labelled),
        "calibration_error": selective.calibration_error(decisions.confidence, as_labelled),
        "rule": rule,
        "target": target,
        "threshold": threshold,
        "elbow": elbow,
        "selective": asdict(chosen),
        "hard_share": float((decisions.rejection == "hard").mean()),
        "soft_share": float((decisions.rejection == "soft").mean()),
        "aurc": selective.aurc(score, right),
        "e_aurc": selective.e_aurc(score, right),
        "seeds_variant": _seeds(wise, foolish),
    }
    plots = folder / "plots"
    draw_selective(plots / "selective.png", score, right, chosen, elbow, selective.seed_curve(wise, foolish))
    after = (decisions.confidence, as_labelled)
    draw_reliability(plots / "reliability.png", (before, as_labelled), after, temperature)
    names = [str(k) for k in range(digits)]
    draw_confusions(plots / "decisions.png", _decision_counts(test.digits, decisions, digits), names)
    with atomic(folder / "selective.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2) + "\n")
    return found


def describe(found: Mapping[str, Any]) -> dict[str, str]:
    """The report in words, by heading."""
    chosen = found["selective"]
    rows = {
        "accuracy": f"{found['accuracy']:.2%} of {found['n_test']:,} test digits, nothing declined",
        "calibration": f"temperature {found['temperature']:.3f}, error {found['calibration_error_before']:.2%} → "
        f"{found['calibration_error']:.2%}",
        "threshold": f"{found['threshold']:.4f} ({found['rule']}"
        + (f" {found['target']:g}" if found["target"] is not None else "")
        + f" on {found['n_calibration']:,} digits apart)",
        "coverage": _with_interval(chosen["coverage"], chosen["coverage_interval"])
        + f", declined: {found['hard_share']:.2%} hard, {found['soft_share']:.2%} soft",
        "accuracy of accepted": "none accepted"
        if chosen["accuracy"] is None
        else _with_interval(chosen["accuracy"], chosen["accuracy_interval"]),
        "AURC": f"{found['aurc']:.5f}, above the best order {found['e_aurc']:.5f}",
    }
    seeds = found["seeds_variant"]
    rows["seed 001's way"] = f"{seeds['wise']:,} wise, {seeds['foolish']:,} foolish" + (
        f"; accuracy {seeds['accuracy']:.2%} at coverage {seeds['coverage']:.2%}, t = {seeds['threshold']:.4f}"
        if seeds["threshold"] is not None
        else ""
    )
    return rows


def _with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2%} (95 %: {interval[0]:.2%} to {interval[1]:.2%})"


def _ordered(judged: Judged, temperature: float, digits: int) -> tuple[Array, Array]:
    """The order in which images are accepted, and whether their best digit is right."""
    right: Array = judged.logits[:, :digits].argmax(1) == judged.digits
    return selective.selection_score(judged.logits, temperature, digits), right


def _decision_counts(truth: Array, decisions: selective.Decisions, digits: int) -> Array:
    """True digits by what became of them, (digits, digits + 1); the last column is IDK."""
    counts = np.zeros((digits, digits + 1), np.int64)
    final = np.where(decisions.declined, digits, decisions.guess)
    np.add.at(counts, (truth, final), 1)
    return counts


def _seeds(wise: Array, foolish: Array) -> dict[str, Any]:
    """The seed's own numbers, fitted and reported on the same digits as the seed did."""
    found: dict[str, Any] = {"wise": len(wise), "foolish": len(foolish), "target": SEED_TARGET}
    try:
        threshold = selective.seed_threshold(wise, foolish, SEED_TARGET)
    except AntherError:
        return {**found, "threshold": None, "accuracy": None, "coverage": None}
    accuracy, coverage = selective.seed_curve(wise, foolish, np.array([threshold]))
    return {**found, "threshold": threshold, "accuracy": float(accuracy[0]), "coverage": float(coverage[0])}
