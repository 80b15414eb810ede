import numpy as np
import pytest
import torch

from diffusion.assets import cache_dir
from diffusion.errors import AntherError
from diffusion.evaluation import hardness as under_test
from diffusion.evaluation.hardness import Judges, folds_of, hardness, held_out_logits, mistakenness


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path / "cache"))


def logits_and_labels(n=200):
    rng = np.random.default_rng(0)
    return rng.normal(scale=4, size=(n, 10)).astype(np.float32), rng.integers(10, size=n)


def test_the_formulas_are_fiftyones():
    core = pytest.importorskip("fiftyone.brain.internal.core.mistakenness")
    from scipy.special import softmax
    from scipy.stats import entropy

    logits, labels = logits_and_labels()
    for row, label, hard, mistaken in zip(logits, labels, hardness(logits), mistakenness(logits, labels), strict=True):
        assert hard == pytest.approx(entropy(softmax(row)), rel=1e-5)
        same = float(row.argmax() == label)  # Brain is told whether the labels agree
        assert mistaken == pytest.approx(core._compute_mistakenness_class(row, same), rel=1e-5)


def test_ends_of_the_scales():
    sure = np.full((2, 10), -100.0)
    sure[:, 3] = 100
    assert hardness(sure) == pytest.approx([0, 0], abs=1e-12)
    assert mistakenness(sure, [3, 4]) == pytest.approx([0, 1])
    assert hardness(np.zeros((1, 10))) == pytest.approx([np.log(10)])


@pytest.mark.parametrize("n", [10, 23, 24])
def test_folds_share_all_images_evenly(n):
    folds = folds_of(n, 17, Judges(folds=3)) if n > 17 else folds_of(n, n, Judges(folds=3))
    counts = np.bincount(folds[:17])
    assert counts.max() - counts.min() <= 1
    assert len(counts) == 3
    assert folds.tolist() != (np.arange(n) % 3).tolist()
    # What is not trained on is dealt in turn.
    assert folds[17:].tolist() == [k % 3 for k in range(17, n)]
    assert folds.tolist() == folds_of(n, min(n, 17), Judges(folds=3)).tolist()
    assert folds.tolist() != folds_of(n, min(n, 17), Judges(folds=3, seed=1)).tolist()


def test_no_network_judges_what_it_was_trained_on():
    """Noise with random labels: who saw an image knows its label, who did not cannot."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(180, 1, 28, 28), dtype=np.uint8)
    labels = np.tile(np.arange(10), 18)
    judges = Judges(folds=3, epochs=60, batch_size=16, lr=0.003)
    right = held_out_logits(images, labels, 150, judges, "d" * 64).argmax(1) == labels
    assert right[:150].mean() < 0.25
    assert right[150:].mean() < 0.35
    # The same training does learn them by heart.
    network = under_test._network(10, [0, 0])
    for _ in under_test._epochs(network, images, labels, np.arange(150), judges, 0):
        pass
    known = under_test.infer(network, under_test.from_uint8(torch.from_numpy(images[:150])))[0]
    assert (known.argmax(1).numpy() == labels[:150]).mean() > 0.9


def test_logits_are_computed_once_per_setting(monkeypatch):
    calls = []

    def judge(images, labels, trained_on, judges, classes):
        calls.append((trained_on, judges))
        return np.full((len(images), classes), len(calls), np.float32)

    monkeypatch.setattr(under_test, "_judge", judge)
    images, labels = np.zeros((20, 1, 28, 28), np.uint8), np.arange(20) % 10
    first = held_out_logits(images, labels, 20, Judges(), "a" * 64)
    assert np.array_equal(held_out_logits(images, labels, 20, Judges(), "a" * 64), first)
    assert len(calls) == 1
    for settings in (Judges(epochs=7), Judges(seed=1), Judges(lr=0.001), Judges(folds=4), Judges(batch_size=64)):
        held_out_logits(images, labels, 20, settings, "a" * 64)
    held_out_logits(images, labels, 20, Judges(), "b" * 64)
    held_out_logits(images, labels, 19, Judges(), "a" * 64)
    assert len(calls) == 8
    # A damaged file is made anew.
    for path in (cache_dir() / "held_out").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    held_out_logits(images, labels, 20, Judges(), "a" * 64)
    assert len(calls) == 9


@pytest.mark.parametrize("settings", [{"folds": 1}, {"epochs": 0}, {"batch_size": 0}])
def test_judges_that_cannot_be(settings):
    with pytest.raises(AntherError, match="judges take folds of 2 or more"):
        Judges(**settings)
