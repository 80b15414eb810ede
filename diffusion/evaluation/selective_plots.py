"""The pictures of a classifier that may decline."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion.evaluation.plots import BLUE, DPI, GREY, ORANGE, save, styled
from diffusion.evaluation.selective import IDK, Selective, aurc, calibration_error, e_aurc, report, risk_coverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray

_BINS = 15
_GREEN = "#4f8a5b"
_PALE = "#dce6ee"


def draw_selective(
    path: Path,
    score_test: Array,
    correct_test: Array,
    chosen: Selective,
    elbow_threshold: float | None,
    seeds: tuple[Array, Array] | None,
) -> None:
    """Accuracy over coverage with what was chosen, and risk over coverage beside the best order of the same images.

    Args:
        path: of the PNG.
        score_test: (N,) of the test split, see `selective.selection_score`.
        correct_test: bool (N,), whether the best digit is the true one.
        chosen: see `selective.report`; of the same split.
        elbow_threshold: see `selective.elbow`; None leaves it out.
        seeds: accuracy and coverage, see `selective.seed_curve`; None leaves it out.
    """
    with styled():
        save(_selective(score_test, correct_test, chosen, elbow_threshold, seeds), path)


def draw_reliability(path: Path, before: tuple[Array, Array], after: tuple[Array, Array], temperature: float) -> None:
    """Accuracy by confidence, before and after temperature, with the number of images in each bin.

    Args:
        path: of the PNG.
        before: confidence (N,), 0 to 1, and bool (N,), whether the prediction is right.
        after: the same after temperature.
        temperature: that was fitted.
    """
    with styled():
        save(_reliability(before, after, temperature), path)


def draw_confusions(path: Path, counts: Array, class_names: Sequence[str]) -> None:
    """What became of each digit; the colours are for what is not on the diagonal.

    Args:
        path: of the PNG.
        counts: integers (K, K + 1), true digit by final decision, IDK the last.
        class_names: K names.
    """
    with styled():
        save(_confusions(counts, class_names), path)


def _selective(
    score: Array, correct: Array, chosen: Selective, elbow_threshold: float | None, seeds: tuple[Array, Array] | None
) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    _accuracy_coverage(left, score, correct, chosen, elbow_threshold, seeds)
    _risk_coverage(right, score, correct)
    start = _start(score, correct, chosen, elbow_threshold, seeds)
    for axes in (left, right):
        axes.set_xlabel("coverage: share of the images that are accepted")
        axes.set_xlim(max(0.0, start - 0.15 * (1 - start)), 1 + 0.02 * (1 - start))
        axes.xaxis.set_major_formatter(_percent)
    return figure


def _percent(value: float, _: int) -> str:
    """Ticks as text: the style has no mathematics, of which matplotlib makes those of a logarithmic axis."""
    return f"{100 * value:.4g}%"


def _start(
    score: Array, correct: Array, chosen: Selective, elbow_threshold: float | None, seeds: tuple[Array, Array] | None
) -> float:
    """The coverage from which on there is something to see: an error, or one of the other marks."""
    if correct.all():
        return 0.0
    marks = [chosen.coverage_interval[0], float((score >= 0).mean())]
    if elbow_threshold is not None:
        marks.append(float((score >= elbow_threshold).mean()))
    if seeds is not None:
        marks += seeds[1].tolist()
    first_error = float((score > score[~correct].max()).mean())
    return min([0.99, first_error, *(coverage for coverage in marks if coverage > 0)])


def _accuracy_coverage(
    axes: Any,
    score: Array,
    correct: Array,
    chosen: Selective,
    elbow_threshold: float | None,
    seeds: tuple[Array, Array] | None,
) -> None:
    curve = risk_coverage(score, correct)
    axes.plot(curve.coverage, curve.accuracy, color=BLUE, lw=1.8, label="accepted digits")
    # A wrong one among the first few images takes the accuracy down to nothing.
    shown = [*curve.accuracy[curve.coverage >= 0.05]]
    if seeds is not None:
        accuracy, coverage = (values[seeds[1] > 0] for values in seeds)
        axes.plot(coverage, accuracy, color=GREY, lw=0.9, label="seed 001's way, where IDK counts as accepted")
        shown += [*accuracy]
    if elbow_threshold is not None:
        found = report(score, correct, elbow_threshold)
        if found.accuracy is not None:
            label = f"elbow, t = {elbow_threshold:.4f}: {found.accuracy:.2%} of {found.coverage:.1%}"
            axes.plot(found.coverage, found.accuracy, "D", color=_GREEN, ms=6, label=label)
            shown.append(found.accuracy)
    if chosen.accuracy is not None and chosen.accuracy_interval is not None:
        axes.errorbar(
            chosen.coverage,
            chosen.accuracy,
            xerr=_arms(chosen.coverage, chosen.coverage_interval),
            yerr=_arms(chosen.accuracy, chosen.accuracy_interval),
            fmt="o",
            color=ORANGE,
            ms=6,
            capsize=3,
            lw=1.3,
            label=f"chosen, t = {chosen.threshold:.4f}: {chosen.accuracy:.2%} of {chosen.coverage:.1%}, and intervals",
        )
        shown.append(chosen.accuracy_interval[0])
    if (score < 0).any():
        axes.axvline((score >= 0).mean(), color=GREY, lw=1, ls=":", label="beyond: what the network calls IDK itself")
    low = min(*shown, 0.999)
    axes.set_ylim(low - 0.06 * (1 - low), 1 + 0.04 * (1 - low))
    axes.yaxis.set_major_formatter(_percent)
    axes.set_ylabel("accuracy of the accepted")
    axes.set_title(f"Accuracy and coverage, {len(score):,} test images")
    axes.legend(loc="lower left", fontsize=8)


def _arms(value: float, interval: tuple[float, float]) -> list[list[float]]:
    return [[value - interval[0]], [interval[1] - value]]


def _risk_coverage(axes: Any, score: Array, correct: Array) -> None:
    area, above = aurc(score, correct), e_aurc(score, correct)
    for order, colour, value, name in (
        (score, BLUE, area, "the classifier's order"),
        (_best_order(correct), ORANGE, area - above, "the best order"),
    ):
        curve = risk_coverage(order, correct)
        axes.plot(curve.coverage, curve.risk, color=colour, lw=1.8, label=f"{name}: AURC {value:.3g}")
    if correct.all():
        axes.set_ylim(-0.02, 1)
    else:
        # Risks of 0 have no place on it, and end at the lower border: half of one error in all images.
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(bottom=0.5 / len(score))
    axes.yaxis.set_major_formatter(_percent)
    axes.yaxis.set_minor_formatter("")
    axes.set_ylabel("risk: share of the accepted that are wrong")
    axes.set_title(f"Risk and coverage, {(~correct).sum():,} errors in all")
    axes.legend(loc="upper left", fontsize=8)


def _best_order(correct: Array) -> Array:
    """Scores that have all right images before all wrong ones, without ties."""
    order: Array = np.arange(len(correct)) / len(correct) + correct
    return order


def _reliability(before: tuple[Array, Array], after: tuple[Array, Array], temperature: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(3, 1))
    for column, ((confidence, correct), title) in enumerate(
        ((before, "Before temperature"), (after, f"After temperature, T = {temperature:.3f}"))
    ):
        top, bottom = panels[:, column]
        edges = np.linspace(0, 1, _BINS + 1)
        count, right, total = (
            np.histogram(confidence, edges, weights=weights)[0] for weights in (None, correct.astype(float), confidence)
        )
        filled = count > 0
        accuracy, mean = right[filled] / count[filled], total[filled] / count[filled]
        places, width = edges[:-1][filled], 1 / _BINS
        top.bar(places, accuracy, width, align="edge", color=BLUE, alpha=0.6, edgecolor="white", label="accuracy")
        top.plot(mean, mean, "_", color=ORANGE, ms=11, mew=2, label="mean confidence")
        top.vlines(mean, accuracy, mean, color=ORANGE, lw=1)
        top.plot((0, 1), (0, 1), color=GREY, lw=1, ls="--")
        top.set_title(f"{title}: ECE {calibration_error(confidence, correct, _BINS):.2%}")
        bars = bottom.bar(places, count[filled], width, align="edge", color=GREY, edgecolor="white")
        bottom.bar_label(bars, fontsize=7, padding=1)
        bottom.set(yscale="log", xlabel="confidence", xlim=(0, 1))
    panels[0, 0].set(ylabel="accuracy", ylim=(0, 1.02))
    # From half an image, so that one has a bar, with room for the labels.
    panels[1, 0].set(ylabel="images", ylim=(0.5, 5 * len(before[0])))
    panels[1, 0].yaxis.set_major_formatter("{x:,.0f}")
    panels[1, 0].yaxis.set_minor_formatter("")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _confusions(counts: Array, class_names: Sequence[str]) -> "Figure":
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    k = len(class_names)
    if counts.shape != (k, k + 1):
        raise ValueError(f"counts of shape {counts.shape} for {k} classes and {IDK}")
    totals = counts.sum(1)
    share = counts / np.maximum(totals, 1)[:, None]
    diagonal = np.eye(k, k + 1, dtype=bool)
    # Nearly everything is right, and IDK is a hundred times as frequent as a confusion: hence no colour for the one,
    # and logarithms for the other.
    other = np.ma.masked_array(share, diagonal | (counts == 0))
    high = float(other.compressed().max(initial=1e-3))
    norm = LogNorm(min(float(other.compressed().min(initial=1.0)), high / 10), high)
    figure = Figure(figsize=(1.6 + 0.58 * (k + 1), 1.4 + 0.46 * k), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.where(diagonal, 1.0, np.nan), cmap=ListedColormap([_PALE]), aspect="auto")
    drawn = axes.imshow(other, cmap="Oranges", norm=norm, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        dark = not diagonal[row, column] and count > 0 and norm(share[row, column]) > 0.6
        colour = "white" if dark else "black" if count else "#b0b0b0"
        axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=colour)
    axes.axvline(k - 0.5, color=GREY, lw=1)
    axes.grid(False)
    axes.set_xticks(range(k + 1), [*class_names, IDK])
    axes.set_yticks(range(k), [f"{name}  ({total})" for name, total in zip(class_names, totals, strict=True)])
    axes.set(title="What became of each digit", xlabel="decision", ylabel="true digit (images)")
    label = "share of the digit's images, off the diagonal"
    bar = figure.colorbar(drawn, ax=axes, label=label, ticks=LogLocator(subs=(1, 2, 5)), format=_percent)
    bar.minorticks_off()
    return figure
