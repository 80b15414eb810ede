from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import beta
from sklearn.metrics import accuracy_score
from torch import nn

from diffusion.errors import AntherError
from diffusion.evaluation import selective
from diffusion.evaluation.selective import (
    IDK,
    SEED_THRESHOLDS,
    Curve,
    aurc,
    calibration_error,
    cascade,
    e_aurc,
    elbow,
    fit_temperature,
    predict_with_idk,
    report,
    risk_coverage,
    seed_curve,
    seed_threshold,
    selection_score,
    threshold_for_accuracy,
    threshold_for_coverage,
    wise_foolish,
)
from diffusion.networks.classifier import LeNet


def logits_of(*rows):
    """Logits whose softmax is those rows, some of it shifted as networks' are."""
    return np.log(np.array(rows)) + np.arange(len(rows))[:, None]


def ties(seed, n, levels=6):
    """Scores with ties, and what is right."""
    rng = np.random.default_rng(seed)
    return rng.integers(levels, size=n) / levels, rng.random(n) < 0.7


# Three digits and IDK.
TABLE = logits_of(
    [0.7, 0.1, 0.1, 0.1],
    [0.1, 0.2, 0.3, 0.4],
    [0.2, 0.5, 0.2, 0.1],
    [0.05, 0.05, 0.1, 0.8],
    [0.1, 0.1, 0.6, 0.2],
)


def test_the_cascade_declines_hard_then_soft():
    found = cascade(TABLE, 0.6 - 1e-12, digits=3)
    np.testing.assert_array_equal(found.raw, [0, 3, 1, 3, 2])
    np.testing.assert_array_equal(found.guess, [0, 2, 1, 2, 2])
    np.testing.assert_allclose(found.confidence, [0.7, 0.4, 0.5, 0.8, 0.6])
    assert found.rejection.tolist() == ["none", "hard", "soft", "hard", "none"]
    assert found.declined.tolist() == [False, True, True, True, False]
    assert found.final == ["0", IDK, IDK, IDK, "2"]
    assert (found.raw.dtype, found.guess.dtype, found.confidence.dtype) == (np.int64, np.int64, np.float64)


def test_without_an_idk_output_there_is_only_the_soft_stage():
    logits = TABLE[:, :3]
    found = cascade(logits, 0.6, digits=3)
    p = softmax(logits, axis=1)
    np.testing.assert_allclose(found.confidence, p.max(1))
    np.testing.assert_array_equal(found.declined, p.max(1) < 0.6)
    assert set(found.rejection) == {"none", "soft"}


def test_a_confidence_that_equals_the_threshold_is_accepted():
    logits = np.random.default_rng(0).normal(size=(50, 11)) * 2
    confidence = cascade(logits, 0).confidence
    for t in confidence:
        found = cascade(logits, t)
        digit = found.raw < 10
        np.testing.assert_array_equal(found.declined[digit], confidence[digit] < t)
        assert found.declined[~digit].all()
    assert cascade(np.array([[0.0, 0.0]]), 0.5, digits=2).final == ["0"]
    assert cascade(np.array([[1e4, 0.0]]), 1, digits=2).final == ["0"]


def test_temperature_divides_the_logits():
    logits = np.random.default_rng(1).normal(size=(20, 11)).astype(np.float32)
    found = cascade(logits, 0.5, temperature=0.25)
    np.testing.assert_allclose(found.confidence, softmax(logits.astype(float) * 4, axis=1).max(1))
    np.testing.assert_array_equal(found.raw, logits.argmax(1))
    np.testing.assert_allclose(
        selection_score(logits[:, :10], 0.25), softmax(logits[:, :10].astype(float) * 4, axis=1).max(1)
    )


def test_digits_that_are_all_but_impossible_are_told_apart():
    logits = np.array([[-900.0, -800.0, 0.0]])
    assert cascade(logits, 0, digits=2).guess == [1]
    wise, foolish = wise_foolish(logits, np.array([1]), digits=2)
    assert (len(wise), len(foolish)) == (0, 1)


@pytest.mark.parametrize("columns", [10, 11])
def test_the_score_accepts_what_the_cascade_accepts(columns):
    logits = np.random.default_rng(2).normal(size=(300, columns)) * 1.5
    score = selection_score(logits, 1.3)
    for t in [0, 1, *score[score >= 0]]:
        np.testing.assert_array_equal(score >= t, ~cascade(logits, t, 1.3).declined)
    p = softmax(logits / 1.3, axis=1)
    hard = logits.argmax(1) == 10
    assert hard.any() == (columns == 11)
    np.testing.assert_allclose(score, p[:, :10].max(1) - hard)
    assert ((score >= -1) & (score <= 1)).all()


@pytest.mark.parametrize("threshold", [-0.1, 1.01, float("nan")])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(AntherError, match="no probability"):
        cascade(TABLE, threshold, digits=3)


def test_logits_of_another_classifier_are_refused():
    for logits in (np.zeros((2, 12)), np.zeros((2, 9)), np.zeros(11)):
        with pytest.raises(AntherError, match="classifier of 10 digits"):
            cascade(logits, 0.5)
    with pytest.raises(AntherError, match="not finite"):
        selection_score(np.full((1, 10), np.nan))
    with pytest.raises(AntherError, match="temperature 0 "):
        cascade(TABLE, 0.5, temperature=0, digits=3)


class Fixed(nn.Module):
    """Gives the logits it was made with, and notes the mode in which it ran."""

    def __init__(self, logits, digits=None):
        super().__init__()
        self.weight = nn.Parameter(torch.as_tensor(logits, dtype=torch.float64))
        self.frozen = nn.Dropout().eval()
        if digits:
            self.digits = digits

    def forward(self, images):
        self.ran = (self.training, torch.is_grad_enabled())
        return self.weight[: len(images)]


def test_predict_with_idk_is_the_task_of_seed_002():
    model = Fixed([[0.0, 0.0], [np.log(3), 0.0], [0.0, np.log(4)]])
    images = torch.zeros(3, 1, 2, 2)
    # The probabilities are ½, ¾ and ⅘.
    assert predict_with_idk(images, model, 0.4) == [0, 0, 1]
    assert predict_with_idk(images, model, 0.78) == [IDK, IDK, 1]
    assert predict_with_idk(images, model, 0.5) == [IDK, 0, 1], "above the threshold, not at it"
    assert predict_with_idk(images[0], model, 0.5) == IDK
    assert predict_with_idk(images[0], model, 0.49) == 0
    assert type(predict_with_idk(images[0], model, 0.49)) is int
    assert model.ran == (False, False)
    assert model.training
    assert not model.frozen.training


def test_predict_with_idk_knows_the_output_that_is_idk():
    model = Fixed([[0.0, 0.0, 5.0], [0.0, 5.0, 0.0]], digits=2)
    assert predict_with_idk(torch.zeros(2, 1, 2, 2), model, 0.1) == [IDK, 1]
    del model.digits
    assert predict_with_idk(torch.zeros(2, 1, 2, 2), model, 0.1) == [2, 1]


def test_predict_with_idk_runs_a_network_without_dropout():
    network = LeNet(11).train()
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    answers = predict_with_idk(images, network, 0)
    assert network.dropout.training
    with torch.no_grad():
        raw = network.eval()(images).argmax(1).tolist()
    assert answers == [IDK if k == 10 else k for k in raw]
    assert [predict_with_idk(image, network, 0) for image in images] == answers
    assert not network.training


def test_predict_with_idk_leaves_a_model_that_failed_as_it_was():
    model = Fixed(np.zeros((1, 11)), digits=3).train()
    model.forward = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        predict_with_idk(torch.zeros(1, 1, 2, 2), model, 0.5)
    assert model.training


def test_predict_with_idk_says_what_it_takes():
    with pytest.raises(AntherError, match=r"shape \(28, 28\).*an image \(1, 28, 28\) or a batch \(B, 1, 28, 28\)"):
        predict_with_idk(torch.zeros(28, 28), LeNet(), 0.5)
    with pytest.raises(AntherError, match=r"shape \(2, 3, 28, 28\)"):
        predict_with_idk(torch.zeros(2, 3, 28, 28), LeNet(), 0.5)
    with pytest.raises(AntherError, match=r"an image \(C, H, W\)"):
        predict_with_idk(torch.zeros(28, 28), Fixed(np.zeros((1, 2))), 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_the_accuracy_of_what_is_accepted(seed):
    score, correct = ties(seed, 40)
    curve = risk_coverage(score, correct)
    assert curve.threshold.tolist() == sorted(set(score), reverse=True)
    for t, coverage, risk, accuracy in zip(curve.threshold, curve.coverage, curve.risk, curve.accuracy, strict=True):
        kept = score >= t
        assert coverage == kept.mean()
        assert risk == pytest.approx(1 - accuracy_score(np.ones(kept.sum()), correct[kept]))
        assert accuracy == pytest.approx(correct[kept].mean())
    assert curve.coverage[-1] == 1


def brute_aurc(wrong):
    """The definition, of one order."""
    return np.mean([np.mean(wrong[:i]) for i in range(1, len(wrong) + 1)])


@pytest.mark.parametrize("seed", range(8))
def test_aurc_is_the_expectation_over_the_orders_of_ties(seed):
    score, correct = ties(seed, 7, levels=3)
    values = [
        brute_aurc(~correct[list(order)])
        for order in permutations(range(7))
        if all(score[a] >= score[b] for a, b in pairwise(order))
    ]
    assert len(values) > 1
    assert aurc(score, correct) == pytest.approx(np.mean(values), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_aurc_without_ties_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    score, correct = rng.normal(size=200), rng.random(200) < 0.8
    assert aurc(score, correct) == pytest.approx(brute_aurc(~correct[np.argsort(-score)]), rel=1e-12)


@pytest.mark.parametrize("wrong", range(8))
def test_e_aurc_is_the_distance_to_the_best_order(wrong):
    correct = np.arange(7) >= wrong
    orders = {tuple(~correct[list(order)]) for order in permutations(range(7))}
    best = min(brute_aurc(np.array(order)) for order in orders)
    score = np.random.default_rng(wrong).permutation(7)
    assert e_aurc(score, correct) == pytest.approx(aurc(score, correct) - best, abs=1e-15)
    assert e_aurc(correct + score / 10, correct) == 0
    assert aurc(correct + score / 10, correct) == pytest.approx(best, abs=1e-15)


def test_aurc_at_its_ends():
    correct = np.random.default_rng(0).random(1000) < 0.9
    assert aurc(np.zeros(1000), correct) == pytest.approx(1 - correct.mean())
    assert aurc(np.arange(1000), np.ones(1000, bool)) == 0
    assert aurc(np.arange(1000), np.zeros(1000, bool)) == 1
    # Its continuous form, which the finite one comes near to: r + (1 - r) log(1 - r).
    r = 1 - correct.mean()
    assert aurc(correct, correct) == pytest.approx(r + (1 - r) * np.log(1 - r), abs=1e-4)


def test_nothing_depends_on_the_order_of_the_images():
    score, correct = ties(3, 500, levels=20)
    order = np.random.default_rng(0).permutation(500)
    shuffled = score[order], correct[order]
    for measure in (aurc, e_aurc, lambda s, c: threshold_for_accuracy(s, c, 0.72), lambda s, c: report(s, c, 0.5)):
        assert measure(*shuffled) == measure(score, correct)
    ours, theirs = risk_coverage(score, correct), risk_coverage(*shuffled)
    np.testing.assert_array_equal(ours.risk, theirs.risk)
    assert calibration_error(*shuffled) == pytest.approx(calibration_error(score, correct))


def test_what_cannot_be_judged_is_refused():
    nothing = np.zeros(0), np.zeros(0, bool)
    for judge in (risk_coverage, aurc, e_aurc, calibration_error, lambda s, c: report(s, c, 0.5)):
        with pytest.raises(AntherError, match="no image"):
            judge(*nothing)
        with pytest.raises(AntherError, match="not numbers"):
            judge(np.array([0.5, np.nan]), np.array([True, False]))
        with pytest.raises(ValueError, match="shape"):
            judge(np.zeros(3), np.zeros(2, bool))
        with pytest.raises(ValueError, match="int64"):
            judge(np.zeros(3), np.array([0, 1, 7]))


def test_the_calibration_error_is_guos():
    rng = np.random.default_rng(0)
    confidence = rng.beta(5, 1, size=5000)
    correct = rng.random(5000) < confidence**2
    for bins in (1, 10, 15):
        expected = 0.0
        for b in range(bins):
            inside = (confidence >= b / bins) & (confidence < (b + 1) / bins)
            if inside.any():
                expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
        assert calibration_error(confidence, correct, bins) == pytest.approx(expected, rel=1e-9)
    assert calibration_error(np.array([0.8] * 10), np.arange(10) < 8) == pytest.approx(0)
    assert calibration_error(np.ones(10), np.arange(10) < 7) == pytest.approx(0.3)
    with pytest.raises(AntherError, match="no probabilities"):
        calibration_error(np.array([0.5, 1.5]), np.array([True, False]))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_the_labels_is_found(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50_000, 10)) * 2
    labels = (rng.random((50_000, 1)) > softmax(logits, axis=1).cumsum(1)).sum(1).clip(max=9)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.02)


def test_the_temperature_is_the_one_that_lbfgs_finds():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(400, 11)).astype(np.float32) * 5, rng.integers(11, size=400)
    logits[np.arange(400), labels] += 6
    rows, classes = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    inverse = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [inverse], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(rows * inverse, classes)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = fit_temperature(logits, labels.astype(np.uint8))
    assert found == pytest.approx(1 / float(inverse.detach()), rel=1e-5)
    assert abs(found - 1) > 0.1


def test_the_temperature_stays_within_its_bounds():
    sure = np.eye(3) / 2
    assert fit_temperature(sure, np.arange(3)) == pytest.approx(0.05, rel=1e-4)
    assert fit_temperature(sure, (np.arange(3) + 1) % 3) == pytest.approx(20, rel=1e-4)


def test_labels_that_the_classifier_does_not_have_are_refused():
    for labels in ([0, 3], [-1, 0]):
        with pytest.raises(AntherError, match="3 classes"):
            fit_temperature(np.zeros((2, 3)), np.array(labels))
    with pytest.raises(AntherError, match="no image"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(AntherError, match="not finite"):
        fit_temperature(np.full((1, 3), np.inf), np.zeros(1, int))
    with pytest.raises(ValueError, match="shape"):
        fit_temperature(np.zeros((2, 3)), np.zeros(3, int))


@pytest.mark.parametrize("seed", range(10))
def test_thresholds_are_the_best_of_all_candidates(seed):
    score, correct = ties(seed, 30, levels=8)
    accuracy = {t: correct[score >= t].mean() for t in set(score)}
    coverage = {t: (score >= t).mean() for t in set(score)}
    # Each of them exactly, and what lies between.
    for target in [*accuracy.values(), 0, 0.71, 0.8]:
        reaching = [t for t in accuracy if accuracy[t] >= target]
        if reaching:
            assert threshold_for_accuracy(score, correct, target) == min(reaching)
    for target in [*coverage.values(), 0, 0.33, 1]:
        assert threshold_for_coverage(score, target) == max(t for t in coverage if coverage[t] >= target)


def test_nine_of_ten_are_an_accuracy_of_nine_tenths():
    for n, k, target in [(10, 9, 0.9), (1000, 965, 0.965), (1000, 999, 0.999), (30, 21, 0.7)]:
        assert threshold_for_accuracy(np.full(n, 0.5), np.arange(n) < k, target) == 0.5
        assert threshold_for_coverage(np.arange(n) / n, k / n) == (n - k) / n


def test_targets_that_cannot_be_reached():
    score, correct = np.array([0.9, 0.8, 0.7, 0.6]), np.array([False, True, True, True])
    with pytest.raises(AntherError, match=r"accuracy of 0.8: the best is 0.75, of 4 accepted of 4"):
        threshold_for_accuracy(score, correct, 0.8)
    for target in (-0.1, 1.1, float("nan")):
        with pytest.raises(AntherError, match="no share"):
            threshold_for_coverage(score, target)


def test_the_elbow_is_farthest_from_the_chord():
    coverage, accuracy = np.array([0.2, 0.5, 0.8, 1.0]), np.array([0.99, 0.985, 0.97, 0.9])
    curve = Curve(np.array([0.9, 0.7, 0.4, 0.1]), coverage, 1 - accuracy)
    a, b = np.array([0.2, 0.99]), np.array([1.0, 0.9])
    along = (b - a) / np.linalg.norm(b - a)
    points = np.stack([coverage, accuracy], 1) - a
    distance = np.linalg.norm(points - np.outer(points @ along, along), axis=1)
    assert elbow(curve) == curve.threshold[distance.argmax()] == 0.4
    below = Curve(curve.threshold, coverage, accuracy)
    assert elbow(below) == 0.4, "on either side of it"


def test_a_curve_without_elbow_accepts_everything():
    assert elbow(risk_coverage(np.arange(5) / 5, np.ones(5, bool))) == 0
    assert elbow(risk_coverage(np.full(5, 0.3), np.arange(5) < 2)) == 0.3


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_intervals_are_clopper_and_pearsons(level):
    score, correct = ties(0, 200, levels=11)
    t = np.sort(score)[70]
    found = report(score, correct, t, level)
    kept = score >= t
    accepted, right = kept.sum(), correct[kept].sum()
    assert (found.n, found.accepted, found.threshold) == (200, accepted, t)
    assert (found.coverage, found.accuracy) == (accepted / 200, right / accepted)
    tail = (1 - level) / 2
    for (low, high), k, n in [
        (found.coverage_interval, accepted, 200),
        (found.accuracy_interval, right, accepted),
    ]:
        assert low == pytest.approx(beta.ppf(tail, k, n - k + 1))
        assert high == pytest.approx(beta.ppf(1 - tail, k + 1, n - k))


def test_where_nothing_is_accepted_there_is_no_accuracy():
    found = report(np.array([0.1, 0.2]), np.array([True, False]), 0.5)
    assert (found.accuracy, found.accuracy_interval, found.accepted, found.coverage) == (None, None, 0, 0.0)
    assert found.coverage_interval == pytest.approx((0, 1 - 0.025**0.5))
    every = report(np.array([0.6, 0.7]), np.array([True, True]), 0.6)
    assert (every.coverage, every.accuracy, every.accuracy_interval[1]) == (1, 1, 1)


def test_wise_and_foolish_by_hand():
    logits = TABLE[[0, 0, 1, 1, 3, 4]]
    labels = np.array([0, 1, 2, 0, 1, 2])
    # Right; a wrong digit; IDK though 2 was right; IDK, and 2 was wrong, twice; right.
    wise, foolish = wise_foolish(logits, labels, digits=3)
    np.testing.assert_allclose(wise, [0.7, 0.4, 0.8, 0.6])
    np.testing.assert_allclose(foolish, [0.7, 0.4])
    warmer, _ = wise_foolish(logits, labels, digits=3, temperature=2)
    np.testing.assert_allclose(warmer, softmax(logits / 2, axis=1).max(1)[[0, 3, 4, 5]])
    wise, foolish = wise_foolish(logits[:, :3], labels, digits=3)
    assert (len(wise), len(foolish)) == (3, 3), "without IDK: right and wrong"
    with pytest.raises(ValueError, match="6 rows of logits"):
        wise_foolish(logits, labels[:2], digits=3)


def seed_numbers():
    """9,160 wise and 840 foolish, of which 1,766 and 576 are below the threshold that the seed chose."""
    t = SEED_THRESHOLDS[76]
    wise = np.concatenate([np.linspace(0.3, t - 1e-9, 1766), np.linspace(t, 1, 9160 - 1766)])
    foolish = np.concatenate([np.linspace(0.1, t - 1e-9, 576), np.linspace(t, 1, 840 - 576)])
    return wise, foolish


def test_the_curve_has_the_numbers_of_seed_001():
    assert SEED_THRESHOLDS[76] == pytest.approx(0.7448484848, abs=1e-10)
    accuracy, coverage = seed_curve(*seed_numbers(), SEED_THRESHOLDS[[76]])
    assert accuracy[0] == pytest.approx(0.96553, abs=5e-6)
    assert coverage[0] == pytest.approx(0.7658)


def test_the_threshold_of_seed_001():
    wise, foolish = seed_numbers()
    foolish[:576] = SEED_THRESHOLDS[75]  # Until then, too many of them are left.
    assert seed_threshold(wise, foolish) == SEED_THRESHOLDS[76]
    assert seed_threshold(wise, foolish, thresholds=SEED_THRESHOLDS[::-1]) == SEED_THRESHOLDS[76]
    assert seed_threshold(wise, foolish, 0.9) == SEED_THRESHOLDS[0]


def test_the_curve_of_seed_001_counts_what_is_not_below():
    wise, foolish = np.array([0.9, 0.5, 0.5]), np.array([0.5, 0.2])
    accuracy, coverage = seed_curve(wise, foolish, np.array([0.2, 0.5, 0.51, 0.9, 0.91]))
    np.testing.assert_allclose(accuracy, [3 / 5, 3 / 4, 1, 1, 1])
    np.testing.assert_allclose(coverage, [1, 4 / 5, 1 / 5, 1 / 5, 0])
    assert seed_threshold(wise, foolish, 0.75, np.array([0.2, 0.5, 0.9])) == 0.5
    with pytest.raises(AntherError, match=r"reaches an accuracy of 0.8: the best is 0.75"):
        seed_threshold(wise, foolish, 0.8, np.array([0.2, 0.5]))
    with pytest.raises(AntherError, match="no image"):
        seed_curve(wise[:0], foolish[:0])


def test_an_unsure_classifier_has_a_lower_score_for_what_it_calls_idk():
    score = selection_score(TABLE, digits=3)
    np.testing.assert_allclose(score, [0.7, 0.3 - 1, 0.5, 0.1 - 1, 0.6])
    assert selective.risk_coverage(score, np.ones(5, bool)).coverage.tolist() == [0.2, 0.4, 0.6, 0.8, 1.0]
