import json
import logging

import numpy as np
import pytest

from diffusion.assets import cache_dir
from diffusion.errors import AntherError
from diffusion.evaluation import reference as module
from diffusion.evaluation.reference import moments, reference

NAMES = [f"daisy/{k}.jpg" for k in range(5)]


@pytest.fixture
def pixels(real_pixels):
    return real_pixels[:5].clone()


@pytest.fixture
def _chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 2)


@pytest.fixture
def computations(monkeypatch):
    """How many images went through Inception."""
    from diffusion.evaluation.inception import Extractor

    seen = []
    features = Extractor.part_features

    def watched(self, images, *args):
        seen.append(len(images))
        return features(self, images, *args)

    monkeypatch.setattr(Extractor, "part_features", watched)
    return seen


def folders():
    return sorted(path.name for path in (cache_dir() / "references").iterdir())


@pytest.mark.usefixtures("_chunks")
def test_moments_are_numpys():
    x = np.random.default_rng(0).normal(3, 2, (7, 4)).astype(np.float32)
    mu, sigma = moments(x)
    np.testing.assert_allclose(mu, x.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(float), rowvar=False), rtol=1e-12)


@pytest.mark.usefixtures("_chunks")
def test_a_reference_is_computed_once(pixels, extractor, computations):
    first = reference(pixels, NAMES, "d", "train", extractor)
    assert computations == [2, 2, 1]
    expected = extractor.features(pixels).pool
    np.testing.assert_allclose(first.features, expected, atol=1e-5)
    np.testing.assert_allclose(first.sigma, np.cov(expected.astype(float), rowvar=False), atol=1e-5)
    assert (len(first), first.names, first.digest, first.split) == (5, tuple(NAMES), "d", "train")
    assert first.protocol == {**extractor.protocol, "image_shape": [3, 32, 32]}
    assert isinstance(first.features, np.memmap)
    assert not first.features.flags.writeable
    del computations[:]
    again = reference(pixels, NAMES, "d", "train", extractor)
    assert computations == []
    np.testing.assert_array_equal(again.features, first.features)
    np.testing.assert_array_equal(again.mu, first.mu)
    np.testing.assert_array_equal(again.sigma, first.sigma)
    np.testing.assert_array_equal(again.radii, first.radii)
    distances = np.linalg.norm(expected[:, None].astype(float) - expected, axis=2)
    np.testing.assert_allclose(first.radii, np.sort(distances, 1)[:, 3], rtol=1e-6)


def test_other_content_or_protocol_is_another_reference(pixels, extractor, inception_script, computations):
    from diffusion.evaluation.inception import load_extractor

    few, names = pixels[:2], NAMES[:2]
    reference(few, names, "d", "train", extractor)
    other = few.clone()
    other[1, 2, 31, 31] ^= 1
    reference(other, names, "d", "train", extractor)
    reference(few, names, "other digest", "train", extractor)
    reference(few, names, "d", "val", extractor)
    reference(few, names[::-1], "d", "train", extractor)
    reference(few, names, "d", "train", load_extractor(inception_script))
    assert len(computations) == len(folders()) == 6


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "unfinished"])
def test_a_broken_reference_is_computed_again_with_a_notice(damage, pixels, extractor, computations, caplog):
    first = reference(pixels[:2], NAMES[:2], "d", "train", extractor)
    expected = np.array(first.features)
    folder = cache_dir() / "references" / folders()[0]
    file = folder / {"missing": "mu.npy", "unfinished": "files.json", "flipped": "sigma.npy"}.get(
        damage, "features.npy"
    )
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[:-100])
    elif damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        again = reference(pixels[:2], NAMES[:2], "d", "train", extractor)
    assert "computed again" in caplog.text
    assert computations == [2, 2]
    np.testing.assert_array_equal(again.features, expected)
    assert sorted(json.loads((folder / "files.json").read_text())) == [
        "features.npy",
        "mu.npy",
        "radii.npy",
        "sigma.npy",
    ]


@pytest.mark.usefixtures("_chunks")
def test_an_interrupted_computation_leaves_no_half_file(pixels, extractor, monkeypatch):
    from diffusion.evaluation.inception import Extractor

    features, calls = Extractor.part_features, []

    def killed(self, images, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return features(self, images, *args)

    monkeypatch.setattr(Extractor, "part_features", killed)
    with pytest.raises(KeyboardInterrupt):
        reference(pixels, NAMES, "d", "train", extractor)
    assert [path for path in (cache_dir() / "references").rglob("*") if path.is_file()] == []
    assert len(reference(pixels, NAMES, "d", "train", extractor)) == 5


def test_what_cannot_be_a_reference_is_refused(pixels, extractor):
    with pytest.raises(AntherError, match="'val' has 1 images, which have no covariance"):
        reference(pixels[:1], NAMES[:1], "d", "val", extractor)
    with pytest.raises(AntherError, match="uint8"):
        reference(pixels / 255, NAMES, "d", "train", extractor)
    with pytest.raises(ValueError, match="4 names for 5 images"):
        reference(pixels, NAMES[:4], "d", "train", extractor)
    assert not (cache_dir() / "references").exists()
