import json
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import entropy
from skimage.filters import sobel

from datamodules.analysis.measure import BAND, PIXELS, _workers, measure, measure_all, statistics, summarise
from datamodules.base import ImageTable

RNG = np.random.default_rng(0)
PICTURES = {
    "noise": RNG.integers(0, 256, (20, 30, 3), np.uint8),
    "flat": np.full((9, 9, 3), 77, np.uint8),
    "bands": RNG.integers(0, 256, (2 * BAND + 7, 30, 3), np.uint8),
    "row": RNG.integers(0, 256, (BAND + 1, 5, 3), np.uint8),  # the last band is one row
    "step": np.repeat(np.repeat(np.array([0] * 8 + [255] * 8, np.uint8)[None, :, None], 12, 0), 3, 2),
    "smooth": np.asarray(Image.fromarray(RNG.integers(0, 256, (4, 4, 3), np.uint8)).resize((48, 40))),
}


@pytest.mark.parametrize("name", PICTURES)
def test_against_scikit_image_scipy_and_numpy(name):
    image = Image.fromarray(PICTURES[name])
    record, _, shares = measure(image, 3)
    grey = np.asarray(image.convert("L"))
    assert record["brightness"] == pytest.approx(grey.mean())
    assert record["contrast"] == pytest.approx(grey.std())
    assert record["edge_density"] == pytest.approx(sobel(grey / 255).mean(), abs=1e-12)
    assert record["entropy"] == pytest.approx(entropy(np.bincount(grey.ravel()), base=2), abs=1e-9)
    assert (record["width"], record["height"]) == image.size
    assert record["aspect"] == image.width / image.height
    for k in range(3):
        assert np.allclose(shares[k], np.bincount(PICTURES[name][..., k].ravel(), minlength=256) / grey.size)


def test_spread_says_whether_there_is_colour():
    grey = Image.fromarray(PICTURES["noise"]).convert("L").convert("RGB")
    assert measure(grey, 3)[0]["spread"] == 0
    assert measure(Image.fromarray(PICTURES["noise"]), 3)[0]["spread"] > 100
    tinted = np.full((20, 20, 3), 100, np.uint8)
    tinted[..., 0] += 30
    assert measure(Image.fromarray(tinted), 3)[0]["spread"] == 30
    # A red berry in a grey landscape is colour; a coloured pixel here and there is not.
    for share, spread in ((0.03, 200), (0.005, 0)):
        berry = np.full((100, 100, 3), 20, np.uint8)
        berry.reshape(-1, 3)[: int(share * 10_000), 0] = 220
        assert measure(Image.fromarray(berry), 3)[0]["spread"] == spread


def test_a_photo_is_measured_in_the_memory_that_is_stated():
    image = Image.effect_noise((2000, 1500), 60).convert("RGB")
    measure(image.resize((8, 8)), 3)  # imports
    tracemalloc.start()
    measure(image, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * image.width * image.height  # NumPy's part; Pillow holds the image itself and planes of it


def test_as_many_at_once_as_memory_allows(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert _workers([10, 24_000_000, 5]) == PIXELS // 24_000_000 == 5
    assert _workers([2 * PIXELS]) == 1
    assert _workers([1024]) == 16


def test_the_hash_is_that_of_imagehash():
    import imagehash

    image = Image.fromarray(PICTURES["smooth"])
    assert f"{measure(image, 3)[1]:016x}" == str(imagehash.phash(image))


def test_16_bits_are_measured_as_they_are_decoded(tmp_path, table):
    from dataclasses import replace

    Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)).save(tmp_path / "a.png")
    measured = measure_all(replace(table, files=(tmp_path / "a.png",) * 12), {"train": np.arange(1)})
    assert measured.frame["brightness"].tolist() == [100]


def test_statistics():
    values = RNG.normal(size=101)
    found = statistics(values)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["std"] == pytest.approx(values.std(ddof=0))
    assert (found["min"], found["median"], found["max"]) == (values.min(), np.median(values), values.max())
    assert (found["quartile_1"], found["quartile_3"]) == tuple(np.quantile(values, [0.25, 0.75]))


@pytest.fixture
def table():
    images = RNG.integers(0, 256, (12, 3, 8, 8), np.uint8)
    return ImageTable(
        images=images,
        labels=torch.tensor([0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 1]),
        class_names=("a", "b", "absent"),
        names=tuple(f"{k:02d}" for k in range(12)),
        captions=("",) * 12,
        digest="0",
        attributes=torch.from_numpy(np.arange(24).reshape(12, 2) % 5 == 0),
        attribute_names=("one", "two"),
    )


def test_summary_of_a_table(table):
    splits = {"train": np.arange(2, 9), "val": np.array([0, 11])}  # 1, 9 and 10 are left out
    rows = [*range(2, 9), 0, 11]
    summary = summarise(measure_all(table, splits), table)
    json.dumps(summary, allow_nan=False)
    assert summary["images"] == {"train": 7, "val": 2}
    assert summary["empty_classes"] == ["absent"]
    assert summary["labels"] == {"train": {"a": 5, "b": 2, "absent": 0}, "val": {"a": 1, "b": 1, "absent": 0}}
    known = table.attributes.numpy()
    assert summary["attributes"]["train"] == pytest.approx({"one": known[2:9, 0].mean(), "two": known[2:9, 1].mean()})
    assert summary["attributes"]["val"] == pytest.approx(
        {"one": known[[0, 11], 0].mean(), "two": known[[0, 11], 1].mean()}
    )
    assert summary["resolutions"] == {"different": 1, "most_frequent": [[8, 8, 9]]}
    for k, name in enumerate(("red", "green", "blue")):
        pixels = table.images[rows, k] / 255
        assert summary["channels"][name] == pytest.approx({"mean": pixels.mean(), "std": pixels.std()})


def test_sizes_are_those_of_the_files_upright(tmp_path, table):
    from dataclasses import replace

    files = []
    for k in range(12):
        size = (30, 20) if k < 7 else (10, 10)
        exif = Image.Exif()
        exif[0x0112] = 6 if k == 0 else 1  # the first lies on its side
        Image.new("RGB", size, (k, 0, 0)).save(tmp_path / f"{k}.png", exif=exif)
        files.append(tmp_path / f"{k}.png")
    summary = summarise(measure_all(replace(table, files=tuple(files)), {"train": np.arange(12)}), table, most=2)
    assert summary["resolutions"] == {"different": 3, "most_frequent": [[30, 20, 6], [10, 10, 5]]}
    assert summary["sizes"]["width"]["mean"] == pytest.approx((6 * 30 + 20 + 5 * 10) / 12)
    assert summary["sizes"]["aspect"]["mean"] == pytest.approx((6 * 1.5 + 20 / 30 + 5) / 12)  # the mean of the ratios
    assert summary["sizes"]["aspect"]["max"] == 1.5
