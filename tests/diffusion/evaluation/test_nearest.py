import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax
from scipy.stats import entropy as scipy_entropy

from diffusion.errors import AntherError
from diffusion.evaluation import nearest as module
from diffusion.evaluation.nearest import entropy, inside, nearest, radii, realism


def points(seed, n, d=5, scale=1.0):
    return (np.random.default_rng(seed).normal(size=(n, d)) * scale).astype(np.float32)


@pytest.fixture(params=[2**20, 35], ids=["one block", "many blocks"])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
def test_nearest_is_the_nearest():
    images, reals = points(0, 23), points(1, 61)
    distance, row = nearest(images, reals)
    d = cdist(images.astype(float), reals.astype(float))
    np.testing.assert_array_equal(row, d.argmin(1))
    np.testing.assert_allclose(distance, d.min(1), rtol=1e-12)
    assert row.dtype == np.int64


@pytest.mark.usefixtures("_blocks")
def test_a_copied_training_image_has_distance_0_and_its_row():
    reals = np.exp(points(2, 50, d=700, scale=2))  # Numbers of many sizes, where a matrix product rounds.
    images = np.concatenate([reals[::-1], np.exp(points(3, 1, d=700, scale=2))])
    distance, row = nearest(images, reals)
    np.testing.assert_array_equal(distance[:50], 0)
    np.testing.assert_array_equal(row[:50], np.arange(50)[::-1])
    assert distance[50] > 1


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("k", [1, 3])
def test_radii_leave_the_point_itself_out(k):
    x = points(4, 40)
    expected = np.sort(cdist(x.astype(float), x.astype(float)), axis=1)[:, k]
    np.testing.assert_allclose(radii(x, k), expected, rtol=1e-9)
    with pytest.raises(AntherError, match="3 images have no 3 neighbours"):
        radii(x[:3], 3)


@pytest.mark.usefixtures("_blocks")
def test_inside_means_the_ball_of_the_other_side():
    x, centres = points(5, 30), points(6, 61)
    balls = np.random.default_rng(0).uniform(0, 1.5, 61)
    expected = (cdist(x.astype(float), centres.astype(float)) <= balls).any(1)
    assert 0 < expected.sum() < 30
    np.testing.assert_array_equal(inside(x, centres, balls), expected)


@pytest.mark.usefixtures("_blocks")
def test_realism_is_equation_3():
    images, reals = points(7, 25, scale=1.5), points(8, 41)
    x, r = images.astype(float), reals.astype(float)
    ball = np.sort(cdist(r, r), axis=1)[:, 3]
    kept = ball <= np.median(ball)
    expected = (ball[kept] / cdist(x, r[kept])).max(1)
    np.testing.assert_allclose(realism(images, reals, radii(reals)), expected, rtol=1e-9)
    # Reals with large radii would make everything near them look real.
    assert (expected < (ball / cdist(x, r)).max(1) - 1e-6).any()


def test_realism_counts_radii_up_to_the_median_and_copies_are_finite():
    reals = np.array([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)
    # The middle has radius 1, the four others sqrt(2), which is the median.
    value = realism(np.array([[0, 2], [0, 0]], np.float32), reals, radii(reals, 3))
    assert value[0] == pytest.approx(2**0.5)
    assert value[1] == pytest.approx(1e5)


def test_entropy_is_scipys_in_nats():
    logits = points(9, 6, d=10, scale=4)
    np.testing.assert_allclose(entropy(logits), scipy_entropy(softmax(logits.astype(float), axis=1), axis=1), rtol=1e-9)
    assert entropy(np.zeros((1, 1008), np.float32))[0] == pytest.approx(np.log(1008))
    assert entropy(np.array([[1e4, 0, 0]], np.float32))[0] == 0


def test_features_of_two_networks_are_refused():
    with pytest.raises(AntherError, match="not of one network"):
        nearest(points(0, 3, d=4), points(0, 3, d=5))
    with pytest.raises(AntherError, match="no real image"):
        nearest(points(0, 3), points(0, 0))


MEMORY = """
import resource
import numpy as np
from diffusion.evaluation.distribution import precision_recall
from diffusion.evaluation.nearest import nearest, radii, realism
for n in (3000, 5000):
    rows = np.random.default_rng(0).normal(size=(n, 16)).astype(np.float32)
    precision_recall(rows, rows)
    nearest(rows, rows)
    realism(rows, rows, radii(rows))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_number_of_images():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    # All pairs of 5,000 take 200 MB in float64, of 3,000 only 72.
    assert many < few + 60
