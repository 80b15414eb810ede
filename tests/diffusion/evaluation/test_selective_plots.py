import numpy as np
import pytest
from PIL import Image

from diffusion.evaluation import selective_plots as module
from diffusion.evaluation.plots import STYLE, styled
from diffusion.evaluation.selective import aurc, calibration_error, e_aurc, report, risk_coverage, seed_curve
from diffusion.evaluation.selective_plots import draw_confusions, draw_reliability, draw_selective


def judged(n=400, hard=20, errors=30):
    """Scores, the last `hard` of them below 0, and what is right: more often where the score is high."""
    rng = np.random.default_rng(0)
    score = np.sort(rng.beta(8, 1, size=n))[::-1].copy()
    score[n - hard :] -= 1
    correct = np.ones(n, bool)
    correct[rng.choice(np.arange(n // 2, n), errors, replace=False)] = False
    return score, correct


def drawn(make, *args):
    """A figure with all its texts made."""
    with styled():
        figure = make(*args)
        figure.canvas.draw()
    return figure


def ticks(axis):
    return [text.get_text() for text in axis.get_ticklabels(which="both") if text.get_text()]


def test_pictures_are_written(tmp_path):
    score, correct = judged()
    draw_selective(tmp_path / "plots/a.png", score, correct, report(score, correct, 0.9), None, None)
    draw_reliability(tmp_path / "plots/b.png", (abs(score), correct), (abs(score), correct), 1.2)
    draw_confusions(tmp_path / "plots/c.png", np.eye(10, 11, dtype=int), "0123456789")
    assert [path.name for path in sorted((tmp_path / "plots").iterdir())] == ["a.png", "b.png", "c.png"]
    for path in (tmp_path / "plots").iterdir():
        assert min(Image.open(path).size) > 500


def test_the_curve_and_its_marks():
    score, correct = judged()
    chosen, elbow = report(score, correct, 0.9), float(score[300])
    seeds = seed_curve(score[correct], score[~correct], np.array([0.5, 0.9, 2.0]))
    left = drawn(module._selective, score, correct, chosen, elbow, seeds).axes[0]
    lines = {line.get_label().split(",")[0]: line for line in left.lines}
    curve = risk_coverage(score, correct)
    np.testing.assert_array_equal(lines["accepted digits"].get_xydata().T, [curve.coverage, curve.accuracy])
    # Where the seed's way leaves nothing it has no accuracy.
    np.testing.assert_array_equal(lines["seed 001's way"].get_xydata().T, [seeds[1][:2], seeds[0][:2]])
    assert lines["elbow"].get_xydata().tolist() == [[301 / 400, correct[:301].mean()]]
    assert lines["beyond: what the network calls IDK itself"].get_xdata()[0] == 380 / 400
    (mark,) = left.containers
    point, _, bars = mark.lines
    assert point.get_xydata().tolist() == [[chosen.coverage, chosen.accuracy]]
    np.testing.assert_allclose(bars[0].get_segments()[0][:, 0], chosen.coverage_interval)
    np.testing.assert_allclose(bars[1].get_segments()[0][:, 1], chosen.accuracy_interval)
    assert mark.get_label().startswith(f"chosen, t = 0.9000: {chosen.accuracy:.2%} of {chosen.coverage:.1%}")
    (low, high), (bottom, top) = left.get_xlim(), left.get_ylim()
    for line in (*left.lines, point):
        x, y = line.get_xydata().astype(float)[-1]
        assert low <= x <= high
        assert bottom <= y <= top


def test_the_risk_is_beside_that_of_the_best_order():
    score, correct = judged()
    right = drawn(module._selective, score, correct, report(score, correct, 0.9), None, None).axes[1]
    ours, best = right.lines
    curve = risk_coverage(score, correct)
    np.testing.assert_array_equal(ours.get_xydata().T, [curve.coverage, curve.risk])
    n = np.arange(1, 401)
    np.testing.assert_allclose(best.get_xydata().T, [n / 400, np.maximum(0, n - 370) / n])
    optimum = aurc(score, correct) - e_aurc(score, correct)
    assert optimum == pytest.approx(np.mean(np.maximum(0, n - 370) / n))
    assert [line.get_label() for line in (ours, best)] == [
        f"the classifier's order: AURC {aurc(score, correct):.3g}",
        f"the best order: AURC {optimum:.3g}",
    ]
    assert right.get_yscale() == "log"
    assert "10%" in ticks(right.yaxis)


@pytest.mark.parametrize("case", ["no error", "all wrong", "one image", "none accepted", "first wrong", "all hard"])
def test_curves_at_their_ends(case, tmp_path):
    score, correct = judged()
    threshold = 0.9
    if case == "no error":
        correct[:] = True
    elif case == "all wrong":
        correct[:] = False
    elif case == "one image":
        score, correct = score[:1], correct[:1]
    elif case == "none accepted":
        threshold = 2.0
    elif case == "first wrong":
        correct[0] = False
    else:
        score = score - 1
    chosen = report(score, correct, threshold)
    figure = drawn(module._selective, score, correct, chosen, threshold, seed_curve(score, score, np.array([0.5])))
    for axes in figure.axes:
        assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()
        assert axes.get_xlim()[0] < axes.get_xlim()[1] - 0.01
    if case == "first wrong":
        assert figure.axes[0].get_xlim()[0] == 0
    assert bool(figure.axes[0].containers) == (chosen.accepted > 0)


def test_bars_are_the_accuracy_in_their_bin():
    rng = np.random.default_rng(1)
    confidence = np.append(rng.uniform(0.3, 1, 600), 1.0)
    correct = rng.random(601) < confidence**2
    after = confidence**1.5
    figure = drawn(module._reliability, (confidence, correct), (after, correct), 1.234)
    before_axes, after_axes, counts_before, counts_after = figure.axes
    for values, axes, counts in ((confidence, before_axes, counts_before), (after, after_axes, counts_after)):
        total = 0
        for bar, count in zip(axes.patches, counts.patches, strict=True):
            low, high = bar.get_x(), bar.get_x() + bar.get_width()
            inside = (values >= low) & ((values < high) | (values == 1) & (high > 0.999))
            assert bar.get_height() == pytest.approx(correct[inside].mean())
            assert count.get_x() == low
            assert count.get_height() == inside.sum()
            total += inside.sum()
        assert total == 601, "a confidence of 1 included"
    assert before_axes.get_title("left") == f"Before temperature: ECE {calibration_error(confidence, correct):.2%}"
    assert after_axes.get_title("left") == f"After temperature, T = 1.234: ECE {calibration_error(after, correct):.2%}"
    assert {"1", "1,000"} <= set(ticks(counts_before.yaxis))


def confused():
    counts = np.diag([900, 950, 980]).astype(int)
    return np.column_stack([counts, [100, 30, 20]]) + np.array([[0, 0, 0, 0], [19, 0, 1, 0], [0, 0, 0, 0]])


def test_every_count_stands_in_its_cell():
    counts = confused()
    axes = drawn(module._confusions, counts, ["zero", "one", "two"]).axes[0]
    found = {text.get_position(): text.get_text() for text in axes.texts}
    assert found == {(column, row): str(counts[row, column]) for row in range(3) for column in range(4)}
    assert ticks(axes.xaxis) == ["zero", "one", "two", "IDK"]
    assert ticks(axes.yaxis) == ["zero  (1000)", "one  (1000)", "two  (1000)"]


def test_the_colours_are_for_what_is_off_the_diagonal():
    figure = drawn(module._confusions, confused(), ["zero", "one", "two"])
    diagonal, others = figure.axes[0].images
    np.testing.assert_array_equal(~np.ma.getmaskarray(diagonal.get_array()), np.eye(3, 4, dtype=bool))
    shares = others.get_array()
    assert shares.mask.tolist() == [[True, True, True, False], [False, True, False, False], [True, True, True, False]]
    assert others.get_clim() == (shares.min(), shares.max()) == (0.001, 0.1)
    assert {"0.1%", "1%", "10%"} <= set(ticks(figure.axes[1].yaxis))


@pytest.mark.parametrize("counts", [np.eye(3, 4, dtype=int) * 9, np.zeros((3, 4), int), np.full((3, 4), 5)])
def test_confusions_at_their_ends(counts):
    figure = drawn(module._confusions, counts, "abc")
    low, high = figure.axes[0].images[1].get_clim()
    assert 0 < low < high <= 1


def test_counts_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(10, 10\) for 10 classes and IDK"):
        module._confusions(np.zeros((10, 10), int), "0123456789")


def test_no_text_needs_mathematics():
    assert STYLE["text.parse_math"] is False
    score, correct = judged()
    figures = [
        drawn(module._selective, score, correct, report(score, correct, 0.9), None, None),
        drawn(module._reliability, (abs(score), correct), (abs(score), correct), 1.0),
        drawn(module._confusions, confused(), "abc"),
    ]
    texts = [text for f in figures for axes in f.axes for axis in (axes.xaxis, axes.yaxis) for text in ticks(axis)]
    assert texts
    assert not [text for text in texts if "$" in text]
