import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.assets import ASSETS, AssetError, cache_dir
from diffusion.errors import AntherError
from diffusion.evaluation import inception
from diffusion.evaluation.inception import load_extractor, load_network, resized
from diffusion.files import sha256


@pytest.fixture
def pixels(real_pixels):
    return real_pixels[:3]


def test_both_files_give_torch_fidelitys_features(pixels, extractor, full_weights, inception_script):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(full_weights))
    pool, logits = network(pixels)
    ours = extractor.features(pixels, batch_size=2)
    assert ours.pool.shape == (3, extractor.dim)
    assert ours.pool.dtype == ours.logits.dtype == np.float32
    np.testing.assert_allclose(ours.pool, pool, atol=1e-5)
    np.testing.assert_allclose(ours.logits, logits, atol=1e-4)
    script = load_extractor(inception_script)
    assert (extractor.has_logits, script.has_logits) == (True, False)
    without = script.features(pixels)
    np.testing.assert_allclose(without.pool, pool, atol=1e-5)
    assert without.logits is None


def test_rekeyed_weights_are_those_of_the_script(pixels, inception_script):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.load(inception_script)
    resized = interpolate_bilinear_2d_like_tensorflow1x(pixels.float(), size=(299, 299), align_corners=False)
    with torch.no_grad():
        expected = script((resized - 128) / 128).flatten(1)
    np.testing.assert_allclose(load_extractor(inception_script).features(pixels).pool, expected, atol=1e-5)


def test_nothing_can_be_computed_from_the_missing_layer(inception_script):
    network, has_logits = load_network(inception_script)
    assert not has_logits
    assert network.fc.weight.isnan().all()
    assert network.fc.bias.isnan().all()


def test_the_network_is_frozen_and_draws_nothing(inception_script):
    state = torch.get_rng_state()
    extractor = inception.Extractor(inception_script)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in extractor._trunk.modules())
    assert not any(parameter.requires_grad for parameter in extractor._trunk.parameters())
    assert {parameter.dtype for parameter in extractor._trunk.parameters()} == {torch.float32}


def test_the_resize_is_torch_fidelitys_bit_for_bit():
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    draws = torch.Generator().manual_seed(0)
    for size in [(28, 28), (32, 32), (64, 48), (299, 299), (417, 640), (1, 2)]:
        images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=draws)
        expected = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        found = resized(images)
        assert torch.equal(found, expected), size
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_autocast_does_not_reach_the_features(pixels, extractor):
    expected = extractor.features(pixels[:1]).pool
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(extractor.features(pixels[:1]).pool, expected, atol=1e-5)


def test_one_network_per_file(inception_script, full_weights, tmp_path):
    assert load_extractor(str(inception_script)) is load_extractor(inception_script, "cpu")
    assert load_extractor(full_weights) is not load_extractor(inception_script)
    assert load_extractor(full_weights, one_channel="repeat") is not load_extractor(full_weights)


def test_the_protocol_names_everything(inception_script):
    import torch_fidelity

    extractor = load_extractor(inception_script)
    assert extractor.name == "inception-v3-compat"
    assert extractor.weights_hash == ASSETS["fid_inception"].sha256
    assert extractor.protocol == {
        "extractor": "inception-v3-compat",
        "weights_sha256": ASSETS["fid_inception"].sha256,
        "resize": "299 x 299, bilinear as TensorFlow 1, no antialiasing",
        "input": "uint8, (x - 128) / 128",
        "one_channel": "refuse",
        "torch_fidelity": torch_fidelity.__version__,
    }


def test_what_inception_cannot_score_is_refused_with_the_reason(pixels, extractor):
    real = pixels.float() / 127.5 - 1
    with pytest.raises(AntherError, match=r"not float32 with values from -\d.* to \d.*to_uint8"):
        extractor.features(real)
    with pytest.raises(AntherError, match="uint8"):
        extractor.features(pixels.long())
    with pytest.raises(AntherError, match="without scaling"):
        extractor.features(((real + 1) / 2).round().to(torch.uint8))
    with pytest.raises(AntherError, match=r"\(N, 3, H, W\), not \(3, 32, 32\)"):
        extractor.features(pixels[0])
    with pytest.raises(AntherError, match=r"not \(3, 4, 32, 32\)"):
        extractor.features(torch.cat([pixels, pixels[:, :1]], 1))
    assert len(extractor.features(pixels[:0])) == 0


def test_a_part_may_be_dark_but_not_the_whole(pixels, extractor, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "_FILED", 2)
    images = pixels[:3].clone()
    images[2] %= 2
    rows = extractor.filed_features(images, tmp_path).pool[:]
    np.testing.assert_allclose(rows, extractor.features(images).pool, atol=1e-4)
    with pytest.raises(AntherError, match="without scaling"):
        extractor.filed_features(images % 2, tmp_path)


def test_one_channel_is_allowed_by_name_only(pixels, extractor, full_weights):
    grey = pixels[:1, :1]
    with pytest.raises(AntherError, match=r"colour photographs only.*inception.one_channel=repeat"):
        extractor.features(grey)
    repeating = load_extractor(full_weights, one_channel="repeat")
    np.testing.assert_array_equal(repeating.features(grey).pool, extractor.features(grey.repeat(1, 3, 1, 1)).pool)
    assert repeating.protocol["one_channel"] == "repeat"
    with pytest.raises(AntherError, match="not 'yes'"):
        load_extractor(full_weights, one_channel="yes")


def test_other_files_are_refused(tmp_path, inception_script):
    with pytest.raises(AntherError, match="no Inception weights at"):
        load_extractor(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    (tmp_path / "half.pt").write_bytes(inception_script.read_bytes()[:100_000])
    for name in ("text.pth", "other.pth", "script.pt", "half.pt"):
        with pytest.raises(AntherError, match=rf"{name} does not hold the weights of the FID Inception"):
            load_extractor(tmp_path / name)


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """No network, and nothing found before."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("fid_inception_full", "fid_inception"):
        monkeypatch.setitem(ASSETS, name, replace(ASSETS[name], urls=(), wheel=None))
    inception._default_weights.cache_clear()
    yield tmp_path / "torch/hub/checkpoints"
    inception._default_weights.cache_clear()


def test_the_full_file_is_preferred(sources, full_weights, inception_script, monkeypatch):
    with pytest.raises(AssetError, match=r"the full FID Inception .* was not found.*; and the FID Inception"):
        load_extractor()
    cached = cache_dir() / "assets" / ASSETS["fid_inception"].file
    cached.parent.mkdir(parents=True)
    shutil.copy(inception_script, cached)
    assert load_extractor().weights_hash == ASSETS["fid_inception"].sha256
    inception._default_weights.cache_clear()
    # Where torch-fidelity keeps its own download.
    sources.mkdir(parents=True)
    shutil.copy(full_weights, sources / "weights-inception-2015-12-05-6726825d.pth")
    table = replace(ASSETS["fid_inception_full"], sha256=sha256(full_weights))
    monkeypatch.setitem(ASSETS, "fid_inception_full", table)
    assert load_extractor().has_logits


def test_the_full_file_is_torch_fidelitys():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    asset = ASSETS["fid_inception_full"]
    assert asset.urls[0] == URL_INCEPTION_V3
    assert asset.torch_hub == asset.file == URL_INCEPTION_V3.rpartition("/")[2]
    # torch names files by the first digits of their sha256.
    assert f"-{asset.sha256[:8]}.pth" in asset.file
