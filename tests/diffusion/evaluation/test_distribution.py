import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import pdist

from diffusion.assets import ASSETS, cache_dir
from diffusion.errors import AntherError
from diffusion.evaluation import distribution as module
from diffusion.evaluation.distribution import (
    check_number,
    distribution_metrics,
    diversity,
    diversity_metrics,
    diversity_pairs,
    fid,
    inception_score,
    kid,
    precision_recall,
    subset_size,
    verdict,
)
from diffusion.evaluation.inception import Features, load_extractor
from diffusion.evaluation.reference import moments, reference
from diffusion.images import PngFiles, from_uint8, save_png, to_uint8

DATA = os.environ.get("ANTHER_TEST_DATA")


def points(seed, n, d=8, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, size=(n, d)).astype(np.float32)


def oracle(generated, real, weights, cache, **options):
    """torch-fidelity on two folders."""
    from torch_fidelity import calculate_metrics

    return calculate_metrics(
        input1=str(generated),
        input2=str(real),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        cuda=False,
        batch_size=16,
        save_cpu_ram=True,
        cache_root=str(cache),
        input1_cache_name="generated",
        verbose=False,
        **options,
    )


# --- the whole way, against torch-fidelity on the same files ----------------------------------------------------------


@pytest.fixture(scope="module")
def fidelity_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("fidelity")


@pytest.fixture(scope="module")
def drawn_reference(real_pixels, extractor):
    return reference(real_pixels, [str(k) for k in range(40)], "digest", "val", extractor)


@pytest.fixture(scope="module")
def metrics(generated_images, generated, drawn_reference, extractor):
    run = {"sampler": "DDPM", "steps": 400, "guidance_weight": 0.5, "first_seed": 3}
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = distribution_metrics(
        generated, drawn_reference, to_uint8(generated_images), extractor, run, few_images="allow"
    )
    assert torch.equal(torch.get_rng_state(), before[0]), "the global generator was moved"
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    return found


def test_drawn_flowers_score_as_in_torch_fidelity(
    metrics, generated_folder, real_pixels, full_weights, fidelity_cache, write_folder, tmp_path
):
    # The last layer of `full_weights` is random, so the Inception Score means nothing, and still must be equal.
    real_folder = write_folder(tmp_path / "real", from_uint8(real_pixels))
    expected = oracle(generated_folder, real_folder, full_weights, fidelity_cache, kid_subset_size=36)
    value = {key: result.value for key, result in metrics.items()}
    assert expected["kernel_inception_distance_mean"] > 0.1
    assert expected["inception_score_mean"] > 1.3
    assert expected["precision"] > 0
    assert expected["recall"] > 0
    assert expected["precision"] != expected["recall"]
    assert value["fid_36"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert value["kid_36"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    # torch-fidelity's kernel is float32: its own rounding is 1e-7 of values near 1.
    assert value["kid_std_36"] == pytest.approx(expected["kernel_inception_distance_std"], abs=1e-6)
    assert value["is_36"] == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    assert value["is_std_36"] == pytest.approx(expected["inception_score_std"], rel=1e-3)
    assert value["precision_36"] == pytest.approx(expected["precision"])
    assert value["recall_36"] == pytest.approx(expected["recall"])


@pytest.mark.skipif(not DATA, reason="needs ANTHER_TEST_DATA")
def test_photographs_score_as_in_torch_fidelity(
    generated, generated_folder, extractor, full_weights, fidelity_cache, write_folder, tmp_path
):
    from zipfile import ZipFile

    from PIL import Image

    photos = []
    with ZipFile(Path(DATA) / "cropped_flowers.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith(".jpg"))
        for name in names[:: len(names) // 30][:30]:
            with archive.open(name) as file:
                photos.append(np.asarray(Image.open(file).convert("RGB").resize((48, 48))).transpose(2, 0, 1))
    pixels = torch.from_numpy(np.stack(photos))
    folder = write_folder(tmp_path / "photos", from_uint8(pixels))
    expected = oracle(generated_folder, folder, full_weights, fidelity_cache, kid_subset_size=30)
    real = extractor.features(pixels).pool
    mean, deviation = kid(generated.pool, real)
    assert fid(generated.pool, *moments(real)) == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)
    assert precision_recall(generated.pool, real) == pytest.approx((expected["precision"], expected["recall"]))


def test_every_metric_carries_its_protocol(metrics, extractor, drawn_reference):
    assert set(metrics) == {f"{name}_36" for name in ["fid", "kid", "kid_std", "is", "is_std", "precision", "recall"]}
    for result in metrics.values():
        protocol = json.loads(json.dumps(result.record()))["protocol"]
        assert protocol["N"] == 36
        assert protocol["N_real"] == 40
        assert protocol["split"] == "val"
        assert protocol["data_digest"] == "digest"
        assert protocol["weights_sha256"] == extractor.weights_hash
        assert "no antialiasing" in protocol["resize"]
        assert protocol["guidance_weight"] == 0.5
        assert protocol["sampler"] == "DDPM"
        assert "36 images, fewer than the protocol's 50, allowed by name" in result.note
    assert metrics["kid_36"].protocol["subset_size"] == 36
    assert metrics["kid_36"].protocol["scoring_seed"] == 2020
    assert metrics["fid_36"].note.startswith("covariance of rank 35 of 2048: compare only with the same N")
    assert metrics["fid_36"].protocol["covariance_rank_real"] == 39
    assert metrics["fid_36"].better == metrics["kid_36"].better == "lower"
    assert metrics["is_36"].better == metrics["precision_36"].better == metrics["recall_36"].better == "higher"
    assert metrics["fid_36"].verdict == verdict("fid", metrics["fid_36"].value) == "poor (not below 50)"
    assert metrics["is_36"].verdict is not None
    assert metrics["precision_36"].verdict is None


def test_without_the_last_layer_there_is_no_inception_score(generated_images, real_pixels, inception_script):
    extractor = load_extractor(inception_script)
    images = to_uint8(generated_images[:3])
    real = reference(real_pixels[:3], list("abc"), "digest", "train", extractor)
    found = distribution_metrics(extractor.features(images), real, images, extractor, {}, few_images="allow")
    for key in ("is_3", "is_std_3"):
        assert found[key].value is None
        assert found[key].verdict is None
        assert "7ff4a85c have no fc layer" in found[key].note
        assert ASSETS["fid_inception_full"].urls[0] in found[key].note
        assert str(cache_dir()) not in found[key].note
        assert ASSETS["fid_inception_full"].file in found[key].note
    assert found["precision_3"].value is None
    assert found["recall_3"].note.startswith("3 images have no 3 neighbours each")
    assert found["fid_3"].value > 0


def test_what_does_not_belong_together_is_refused(
    generated_images, generated, drawn_reference, extractor, full_weights
):
    images = to_uint8(generated_images)
    with pytest.raises(AntherError, match=r"36 generated and 40 real images are too few.*inception.few_images=allow"):
        distribution_metrics(generated, drawn_reference, images, extractor, {})
    other = load_extractor(full_weights, one_channel="repeat")
    with pytest.raises(AntherError, match="one_channel refuse against repeat"):
        distribution_metrics(generated, drawn_reference, images, other, {}, few_images="allow")
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    with pytest.raises(AntherError, match=r"image_shape \[3, 32, 32\] against \[3, 64, 64\]"):
        distribution_metrics(generated, drawn_reference, large, extractor, {}, few_images="allow")
    with pytest.raises(ValueError, match="35 images for 36 rows"):
        distribution_metrics(generated, drawn_reference, images[1:], extractor, {}, few_images="allow")


# --- each metric by itself --------------------------------------------------------------------------------------------


def test_few_images_are_allowed_by_name():
    check_number(50, 50)
    check_number(2, 2, "allow")
    check_number(20, 20, minimum=20)
    with pytest.raises(AntherError, match="49 generated and 1000 real images are too few"):
        check_number(49, 1000)
    with pytest.raises(AntherError, match="1000 generated and 49 real images are too few"):
        check_number(1000, 49)
    with pytest.raises(AntherError, match="cannot be compared"):
        check_number(1, 1000, "allow")
    with pytest.raises(AntherError, match="not 'yes'"):
        check_number(100, 100, "yes")


def test_fid_is_the_formula_with_scipys_root():
    generated, real = points(0, 90), points(1, 70, shift=0.3) * 1.4
    mu, sigma = moments(real)
    root = sqrtm(np.cov(generated.astype(float), rowvar=False) @ sigma)
    expected = np.sum((generated.astype(float).mean(0) - mu) ** 2)
    expected += np.trace(np.cov(generated.astype(float), rowvar=False) + sigma - 2 * root.real)
    assert fid(generated, mu, sigma) == pytest.approx(expected, rel=1e-9)


def test_fid_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    generated, real = points(0, 90, d=20), points(1, 70, d=20, shift=0.3)
    features = torch.nn.Identity()
    features.num_features = 20
    metric = FrechetInceptionDistance(features)
    metric.update(torch.from_numpy(generated).double(), real=False)
    metric.update(torch.from_numpy(real).double(), real=True)
    assert fid(generated, *moments(real)) == pytest.approx(float(metric.compute()), rel=1e-9)


def test_fid_of_gaussians_is_the_closed_form():
    # Whitened, so that mean and covariance of the sample are those of the Gaussian.
    x = points(2, 500, d=4).astype(np.float64)
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    mean, deviation = np.array([1.0, 0, -2, 0.5]), np.array([0.5, 1, 2, 3])
    other_mean, other = np.zeros(4), np.array([1.0, 1, 1, 2])
    expected = np.sum((mean - other_mean) ** 2) + np.sum((deviation - other) ** 2)
    assert fid(mean + deviation * x, other_mean, np.diag(other**2)) == pytest.approx(expected, rel=1e-9)


def test_fid_of_a_set_with_itself_is_0():
    x = points(3, 200, d=64)
    assert fid(x, *moments(x)) == pytest.approx(0, abs=1e-9)
    # Fewer images than dimensions: the root of the singular product rounds.
    assert fid(x[:20], *moments(x[:20])) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("gram_rows", [4096, 0], ids=["one kernel", "a kernel per subset"])
@pytest.mark.parametrize(("n", "m"), [(30, 30), (30, 47), (47, 30)])
def test_kid_is_torch_fidelitys(n, m, gram_rows, monkeypatch):
    from torch_fidelity.metric_kid import kid_features_to_metric

    monkeypatch.setattr(module, "_GRAM_ROWS", gram_rows)
    generated, real = points(4, n), points(5, m, shift=0.5)
    expected = kid_features_to_metric(
        torch.from_numpy(generated).double(), torch.from_numpy(real).double(), kid_subset_size=30, verbose=False
    )
    mean, deviation = kid(generated, real)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9, abs=1e-12)


def test_kid_is_unbiased():
    values = [kid(points(100 + k, 10), points(900 + k, 10), subsets=1)[0] for k in range(300)]
    error = np.std(values) / 300**0.5
    assert abs(np.mean(values)) < 3 * error
    shifted = [kid(points(100 + k, 10), points(900 + k, 10, shift=1.0), subsets=1)[0] for k in range(20)]
    assert np.mean(shifted) > 30 * error


def test_subsets_have_1000_images_at_most():
    assert [subset_size(*sizes) for sizes in ((5000, 3000), (200, 3000), (5000, 30))] == [1000, 200, 30]


@pytest.mark.parametrize("logits_rows", [1024, 3], ids=["one part", "many parts"])
@pytest.mark.parametrize("n", [40, 47])
def test_inception_score_is_torch_fidelitys(n, logits_rows, monkeypatch):
    from torch_fidelity.metric_isc import isc_features_to_metric

    monkeypatch.setattr(module, "_LOGITS", logits_rows)
    logits = points(6, n, d=20) * 3
    expected = isc_features_to_metric(torch.from_numpy(logits))
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(expected["inception_score_std"], rel=1e-9)


def test_inception_score_knows_worst_and_best():
    assert inception_score(np.zeros((50, 1008), np.float32)) == pytest.approx((1, 0), abs=1e-9)
    sure = np.tile(np.eye(5, dtype=np.float32) * 1000, (10, 1))
    assert inception_score(sure, splits=1)[0] == pytest.approx(5)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (30, 55)])
def test_precision_and_recall_are_torch_fidelitys(n, m):
    from torch_fidelity.metric_prc import prc_features_to_metric

    generated, real = points(7, n, d=3) * 0.7, points(8, m, d=3)
    expected = prc_features_to_metric(torch.from_numpy(generated), torch.from_numpy(real), verbose=False)
    precision, recall = precision_recall(generated, real)
    assert 0 < recall < precision - 0.1, "the case tells the directions apart"
    assert (precision, recall) == pytest.approx((expected["precision"], expected["recall"]))


def test_precision_and_recall_of_a_set_with_itself_are_1():
    x = points(9, 30)
    assert precision_recall(x, x) == (1, 1)


def test_a_model_of_one_species_has_precision_and_no_recall():
    real = np.concatenate([points(10, 30), points(11, 30, shift=50)])
    precision, recall = precision_recall(points(12, 30), real)
    assert precision > 0.5 > recall


def test_exact_diversity_is_scipys(monkeypatch):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (23, 3, 6, 5), np.uint8))
    images[4] = images[9]  # Distance 0 must not round.
    expected = pdist(images.flatten(1).double().numpy() / 255).mean()
    assert diversity_pairs(images) == pytest.approx(expected, rel=1e-12)
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, 3, 640, 640), np.uint8))
    expected = pdist(images.flatten(1).double().numpy() / 255).mean()
    assert diversity_pairs(images) == pytest.approx(expected, rel=1e-12)
    assert diversity_pairs(images[:1].repeat(3, 1, 1, 1)) == 0


def test_diversity_stands_under_its_number_with_its_protocol():
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = diversity_metrics(images, {"steps": 7})
    assert {key: result.value for key, result in found.items()} == {
        "diversity_5": diversity(images),
        "diversity_pairs_5": diversity_pairs(images),
    }
    pairs = {key: result.protocol["pairs"] for key, result in found.items()}
    assert pairs == {"diversity_5": 10, "diversity_pairs_5": 10}
    assert all(result.protocol["N"] == 5 and result.protocol["steps"] == 7 for result in found.values())
    assert list(diversity_metrics(images[:1], {})) == ["diversity_1"]  # one image makes no pair


def test_many_images_are_paired_by_a_choice_that_the_key_names(monkeypatch):
    images = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (40, 3, 4, 4), np.uint8))
    monkeypatch.setattr(module, "PAIRED", 15)
    found = diversity_metrics(images, {})
    assert list(found) == ["diversity_40", "diversity_pairs_15"]
    chosen = np.random.RandomState(2020).permutation(40)[:15]
    result = found["diversity_pairs_15"]
    assert result.value == pytest.approx(pdist(images[chosen].flatten(1).double().numpy() / 255).mean(), rel=1e-12)
    assert "15 of the 40 images" in result.note
    assert (result.protocol["N"], result.protocol["pairs"], result.protocol["chosen_from"]) == (15, 105, 40)
    assert "chosen_from" not in found["diversity_40"].protocol


def test_images_in_files_are_as_diverse_as_in_memory(tmp_path):
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (9, 3, 5, 4), np.uint8))
    paths = [tmp_path / f"{k}.png" for k in range(9)]
    for path, image in zip(paths, images, strict=True):
        save_png(from_uint8(image), path)
    assert {k: r.value for k, r in diversity_metrics(PngFiles(paths), {}).items()} == {
        k: r.value for k, r in diversity_metrics(images, {}).items()
    }


def test_random_diversity_is_the_seeds():
    images = torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), 255)]).to(torch.uint8)
    distance = (3 * 8 * 8) ** 0.5
    values = np.array([diversity(images, seed) for seed in range(200)]) / distance
    # min(100, 2 N) = 4 pairs, of which an image may be its own partner: 0, 1, ... 4 quarters, a half on average.
    assert set(np.round(values * 4, 9)) == {0, 1, 2, 3, 4}
    assert values.mean() == pytest.approx(0.5, abs=0.06)
    assert diversity(images, 5) == diversity(images, 5)
    many = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (300, 3, 4, 4), np.uint8))
    assert diversity(many) == pytest.approx(diversity_pairs(many), rel=0.05)


@pytest.mark.parametrize(
    ("metric", "value", "expected"),
    [
        ("fid", 19.9, "excellent (below 20)"),
        ("fid", 20.0, "good (below 50)"),
        ("fid", 49.9, "good (below 50)"),
        ("fid", 50.0, "poor (not below 50)"),
        ("kid", -0.001, "excellent (below 0.02)"),
        ("kid", 0.03, "good (below 0.05)"),
        ("kid", 0.05, "poor (not below 0.05)"),
        ("is", 7.1, "excellent (above 7)"),
        ("is", 7.0, "good (above 3)"),
        ("is", 3.0, "poor (not above 3)"),
        ("precision", 0.9, None),
        ("fid", float("nan"), None),
    ],
)
def test_verdicts_are_those_of_seed_004(metric, value, expected):
    assert verdict(metric, value) == expected


def test_features_know_their_number():
    assert len(Features(np.zeros((3, 2048), np.float32))) == 3
