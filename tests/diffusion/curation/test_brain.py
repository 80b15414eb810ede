"""Brain's scores as formulas, against the installed FiftyOne Brain."""

import numpy as np
import pytest

from diffusion.curation import brain
from diffusion.errors import AntherError


def random(n, d=6, seed=0):
    return (np.random.default_rng(seed).normal(size=(n, d)) + 5).astype(np.float32)


@pytest.fixture
def by_brain(fiftyone):
    """(embeddings) -> the scores of FiftyOne Brain, by name."""
    import fiftyone.brain as fob

    def compute(embeddings):
        dataset = fiftyone.Dataset()
        dataset.add_samples([fiftyone.Sample(filepath=f"/{k}.png") for k in range(len(embeddings))])
        fob.compute_uniqueness(dataset, embeddings=embeddings.copy())
        if len(embeddings) >= 20:
            with np.errstate(invalid="ignore"):
                fob.compute_representativeness(dataset, embeddings=embeddings.copy())
        names = [n for n in ("uniqueness", "representativeness") if dataset.has_field(n)]
        scores = {name: np.array(dataset.values(name), dtype=float) for name in names}
        dataset.delete()
        return scores

    return compute


@pytest.mark.parametrize("n", [2, 3, 4, 5, 19, 20, 40, 300])
def test_equals_brain(by_brain, n):
    embeddings = random(n, seed=n)
    expected = by_brain(embeddings)
    np.testing.assert_allclose(brain.uniqueness(embeddings), expected["uniqueness"], atol=1e-6)
    if n < 20:
        assert brain.representativeness(embeddings) is None
    else:
        np.testing.assert_allclose(brain.representativeness(embeddings), expected["representativeness"], atol=1e-6)


def test_uniqueness_of_many_equals_the_search_that_brain_uses_then(fiftyone):
    from fiftyone.brain.internal.core.sklearn import NeighborsHelper

    embeddings = random(brain.EXACT + 1, d=3)
    neighbours, distances = NeighborsHelper(embeddings.copy(), "cosine").get_neighbors()
    assert distances is None
    nearest = neighbours.kneighbors(n_neighbors=4)[0]
    expected = nearest[:, 1:] @ [0.6, 0.3, 0.1]
    np.testing.assert_allclose(brain.uniqueness(embeddings), expected / expected.max(), atol=1e-6)


def test_brain_raises_where_representativeness_is_none(fiftyone):
    import fiftyone.brain as fob

    dataset = fiftyone.Dataset()
    dataset.add_samples([fiftyone.Sample(filepath=f"/{k}.png") for k in range(19)])
    with pytest.raises(ValueError, match="n_clusters=20"):
        fob.compute_representativeness(dataset, embeddings=random(19))
    dataset.delete()


def test_copies_are_not_unique(by_brain):
    embeddings = random(30)
    embeddings[1] = embeddings[0]
    embeddings[10:15] = embeddings[10]
    for scores in (brain.uniqueness(embeddings), by_brain(embeddings)["uniqueness"]):
        assert np.abs(scores[10:15]).max() < 1e-6
        assert scores[20:].min() > 0.1
        # The installed Brain skips the nearest neighbour, so one copy does not lower the score.
        assert scores[0] > 0.1
        assert scores.max() == 1


def test_direction(by_brain):
    """200 points in 20 far clusters of ten: one at its centre, one far from it."""
    rng = np.random.default_rng(0)
    embeddings = np.repeat(1000 * rng.normal(size=(20, 8)), 10, axis=0) + rng.normal(size=(200, 8))
    embeddings[1] = embeddings[2:10].mean(0) + 20
    embeddings[0] = embeddings[1:10].mean(0)
    brains, ours = by_brain(embeddings)["representativeness"], brain.representativeness_closeness(embeddings)
    assert brains[0] == pytest.approx(0, abs=1e-6)
    assert brains[1] == pytest.approx(1, abs=1e-6)
    assert ours[0] == pytest.approx(1, abs=1e-6)
    assert ours[1] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(ours, 1 - brains, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 19, 20, 45])
def test_closeness_has_a_value_for_every_number_of_images(n):
    scores = brain.representativeness_closeness(random(n))
    assert scores.shape == (n,)
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    if 2 < n < 20:  # one cluster: its centre is the mean
        embeddings = random(n)
        order = np.linalg.norm(embeddings - embeddings.mean(0), axis=1).argsort()
        assert list((-scores).argsort()) == list(order)


def test_the_centres_of_many_are_those_of_a_choice(monkeypatch):
    from sklearn.cluster import KMeans

    embeddings = random(90)
    monkeypatch.setattr(brain, "FITTED", 60 * 6)
    monkeypatch.setattr(brain, "FITTED_ROWS", 10)
    chosen = np.sort(np.random.default_rng(1234).permutation(90)[:60])
    clusters = KMeans(20, random_state=1234).fit(embeddings[chosen])
    distances = clusters.transform(embeddings).min(1)
    labels = clusters.predict(embeddings)
    with np.errstate(invalid="ignore"):  # a cluster of one
        expected = distances / np.array([distances[labels == label].max() for label in labels])
    np.testing.assert_allclose(brain.representativeness(embeddings), expected, rtol=1e-5)
    assert not brain.fits_all(embeddings)
    whole = KMeans(20, random_state=1234).fit(embeddings)
    distances = whole.transform(embeddings).min(1)
    of_each = np.array([distances[whole.labels_ == label].max() for label in whole.labels_])
    with np.errstate(invalid="ignore"):
        expected = distances / of_each
    np.testing.assert_allclose(brain.representativeness(embeddings, every=True), expected, rtol=1e-5)
    monkeypatch.setattr(brain, "FITTED_ROWS", 90)  # so many rows are always seen, however long they are
    np.testing.assert_allclose(brain.representativeness(embeddings), expected, rtol=1e-5)


def test_parts_change_nothing(monkeypatch):
    embeddings = random(70)
    expected = brain.scores(embeddings)
    monkeypatch.setattr(brain, "_PART", 9)
    for name, column in brain.scores(embeddings).items():
        np.testing.assert_allclose(column, expected[name], atol=1e-6)


def test_copies_are_at_their_centre():
    assert (brain.representativeness_closeness(np.full((25, 3), 0.1, dtype=np.float32)) == 1).all()


def test_scores_by_name():
    scores = brain.scores(random(24))
    assert list(scores) == ["uniqueness", "representativeness", "representativeness_closeness"]
    np.testing.assert_array_equal(scores["uniqueness"], brain.uniqueness(random(24)))
    assert list(brain.scores(random(12))) == ["uniqueness", "representativeness_closeness"]
    assert list(brain.scores(random(4))) == ["representativeness_closeness"]


def test_refuses_what_is_no_embedding():
    with pytest.raises(AntherError, match=r"shape \(N, D\)"):
        brain.uniqueness(random(8).reshape(4, 2, 6))
    embeddings = random(8)
    embeddings[3, 1] = np.nan
    with pytest.raises(AntherError, match="row 3"):
        brain.scores(embeddings)
