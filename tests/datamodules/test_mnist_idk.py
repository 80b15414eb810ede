import numpy as np
import pytest
import torch

from datamodules import mnist_idk
from datamodules.mnist import MNIST
from datamodules.mnist_idk import MNISTWithIDK, hardest
from diffusion.errors import AntherError
from diffusion.evaluation.hardness import hardness, mistakenness

N = 70_000


@pytest.fixture
def logits(monkeypatch):
    """MNIST's size without its files, and judges that are unsure of some digits and mistaken about others."""
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=N).astype(np.uint8)
    pixels = np.zeros((N, 28, 28), np.uint8)
    parts = {"train": slice(0, 60_000), "t10k": slice(60_000, N)}

    def read(self, name):
        which, what = name.removeprefix("mnist/").split("-")
        return (pixels if what == "images" else labels)[parts[which]]

    logits = rng.normal(size=(N, 10)).astype(np.float32)
    logits[np.arange(N), labels] += rng.uniform(0, 12, N).astype(np.float32)
    asked = []

    def judge(images, digits, trained_on, judges, digest):
        asked.append((images.shape, trained_on, judges))
        return logits

    monkeypatch.setattr(MNIST, "_read", read)
    monkeypatch.setattr(mnist_idk, "held_out_logits", judge)
    return {"logits": logits, "labels": labels.astype(int), "asked": asked}


def module(**settings):
    made = MNISTWithIDK(batch_size=4, seed=0, **settings)
    made.setup()
    return made


def test_the_hardest_digits_are_idk(logits):
    data = module(quantile=0.1, judges={"folds": 3})
    scores = hardness(logits["logits"]), mistakenness(logits["logits"], logits["labels"])
    union = np.zeros(N, bool)
    for score in scores:
        limit = np.sort(score[:60_000])[-6000]
        union |= score >= limit
    idk = data.table.labels.numpy() == 10
    assert np.abs(idk.sum() - union.sum()) <= 4
    assert (idk != union).sum() <= 4
    assert np.array_equal(data.table.labels.numpy()[~idk], logits["labels"][~idk])
    assert np.array_equal(data.digits.numpy(), logits["labels"])
    assert data.class_names == (*"0123456789", "IDK")
    assert logits["asked"][0][:2] == ((N, 1, 28, 28), 60_000)
    assert logits["asked"][0][2].folds == 3
    assert f"{int(idk[data.splits['test']].sum()):,} of test" in data.describe()


def test_the_test_digits_do_not_move_the_limit(logits):
    before = module(quantile=0.1).table.labels[:60_000]
    logits["logits"][60_000:] = 0  # all of them utterly unsure
    after = module(quantile=0.1).table.labels
    assert torch.equal(before, after[:60_000])
    assert (after[60_000:] == 10).all()


def test_criteria_and_their_combination(logits):
    def idk(**settings):
        return set(torch.nonzero(module(quantile=0.1, **settings).table.labels == 10)[:, 0].tolist())

    hard, mistaken = idk(criteria=["hardness"]), idk(criteria=["mistakenness"])
    assert hard != mistaken
    assert idk() == idk(combine="union") == hard | mistaken
    assert idk(combine="intersection") == hard & mistaken
    assert len(idk(criteria=["hardness"]) & set(range(60_000))) == pytest.approx(6000, abs=1)


def test_data_with_other_labels_have_another_digest(logits):
    digests = {module(quantile=q).table.digest for q in (0.02, 0.1, 0.1, 0.2)}
    assert len(digests) == 3


def test_a_border_is_not_judged(logits):
    assert module(size=32).image_shape == (1, 32, 32)
    assert logits["asked"][0][0] == (N, 1, 28, 28)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quantile": 0}, "quantile"),
        ({"quantile": 1.0}, "quantile"),
        ({"criteria": []}, "criteria"),
        ({"criteria": ["hardness", "size"]}, "criteria"),
        ({"combine": "both"}, "combine"),
        ({"judges": {"folds": 1}}, "folds"),
    ],
)
def test_bad_settings(settings, says):
    with pytest.raises(AntherError, match=says):
        MNISTWithIDK(batch_size=4, seed=0, **settings)


def test_hardest_by_hand():
    scores = [np.array([0.0, 1, 2, 3, 9]), np.array([3.0, 2, 1, 0, 0])]
    assert hardest(scores, 0.25, "union", 4).tolist() == [True, False, False, True, True]
    assert hardest(scores, 0.5, "intersection", 4).tolist() == [False] * 5
    assert hardest(scores[:1], 0.5, "union", 4).tolist() == [False, False, True, True, True]


def test_balanced_classes_are_drawn_equally_often(logits):
    data = module(quantile=0.2, balanced=True)
    data.batch_size = 1000
    drawn = torch.cat([batch["label"] for batch, _ in zip(data.train_dataloader(), range(20), strict=False)])
    shares = torch.bincount(drawn, minlength=11) / len(drawn)
    assert torch.allclose(shares, torch.full((11,), 1 / 11), atol=0.01)
