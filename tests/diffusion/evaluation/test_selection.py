import json

import numpy as np
import pytest

from diffusion.errors import AntherError
from diffusion.evaluation.selection import Judged, assess, describe, fit_threshold
from diffusion.evaluation.selective import selection_score


def judged(n: int, seed: int, columns: int = 11) -> Judged:
    """Logits from which the labels are drawn, so that they are calibrated; sharpened twofold, so that T is 2."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=3, size=(n, columns))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(columns, p=row) for row in p])
    # What IDK really is, is the best digit or another one.
    digits = np.where(
        labels < 10, labels, np.where(rng.random(n) < 0.5, logits[:, :10].argmax(1), rng.integers(10, size=n))
    )
    return Judged(2 * logits, labels, digits)


def test_fitted_on_one_split_and_reported_on_the_other(tmp_path):
    calibration, test = judged(4000, 0), judged(6000, 1)
    found = assess(calibration, test, 10, "accuracy", 0.9, tmp_path)
    assert json.loads((tmp_path / "selective.json").read_text()) == json.loads(json.dumps(found))
    assert found["temperature"] == pytest.approx(2, abs=0.1)
    assert found["calibration_error"] < 0.03 < found["calibration_error_before"]
    score = selection_score(calibration.logits, found["temperature"])
    right = calibration.logits[:, :10].argmax(1) == calibration.digits
    taken = score >= found["threshold"]
    assert right[taken].mean() >= 0.9
    # By hand on the test digits.
    p = np.exp(test.logits / found["temperature"])
    p /= p.sum(1, keepdims=True)
    accepted = (p.argmax(1) < 10) & (p.max(1) >= found["threshold"])
    correct = test.logits[:, :10].argmax(1) == test.digits
    assert found["selective"]["coverage"] == pytest.approx(accepted.mean())
    assert found["selective"]["accuracy"] == pytest.approx(correct[accepted].mean())
    assert found["accuracy"] == pytest.approx(correct.mean())
    assert found["hard_share"] == pytest.approx((p.argmax(1) == 10).mean())
    assert found["hard_share"] + found["soft_share"] == pytest.approx(1 - accepted.mean())
    assert (found["n_calibration"], found["n_test"]) == (4000, 6000)
    for name in ("selective", "reliability", "decisions"):
        assert (tmp_path / "plots" / f"{name}.png").exists()
    # Other test digits do not move what was fitted.
    other = assess(calibration, judged(500, 2), 10, "accuracy", 0.9, tmp_path)
    assert (other["threshold"], other["temperature"]) == (found["threshold"], found["temperature"])
    assert other["selective"] != found["selective"]


def test_the_seeds_variant_is_fitted_and_reported_on_the_same_digits(tmp_path):
    test = judged(3000, 1)
    found = assess(judged(1000, 0), test, 10, "elbow", None, tmp_path)["seeds_variant"]
    raw, guess = test.logits.argmax(1), test.logits[:, :10].argmax(1)
    foolish = ((raw < 10) & (raw != test.digits)) | ((raw == 10) & (guess == test.digits))
    assert (found["wise"], found["foolish"]) == (3000 - foolish.sum(), foolish.sum())


def test_a_classifier_of_ten_digits(tmp_path):
    found = assess(judged(2000, 0, 10), judged(2000, 1, 10), 10, "coverage", 0.5, tmp_path)
    assert found["hard_share"] == 0
    assert found["selective"]["coverage"] == pytest.approx(0.5, abs=0.05)
    words = describe(found)
    assert "coverage 0.5 on 2,000 digits apart" in words["threshold"]
    assert words["accuracy"].endswith("of 2,000 test digits, nothing declined")


def test_no_threshold_accepts_what_the_network_calls_idk(tmp_path):
    score, right = np.array([0.9, 0.8, -0.3]), np.array([True, True, True])
    assert fit_threshold(score, right, "accuracy", 0.99) == 0
    assert fit_threshold(score, right, "coverage", 1.0) == 0


@pytest.mark.parametrize(("rule", "target"), [("accuracy", None), ("coverage", None), ("luck", 0.5)])
def test_rules_that_cannot_be_followed(rule, target):
    with pytest.raises(AntherError, match=f"the rule '{rule}'"):
        fit_threshold(np.array([0.5, 0.6]), np.array([True, False]), rule, target)
