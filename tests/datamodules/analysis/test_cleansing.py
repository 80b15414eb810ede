import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageEnhance, ImageFilter

from datamodules.analysis import cleansing
from datamodules.analysis.cleansing import REASONS, Limits, _by_precedence, _twins, find, near_twins
from datamodules.analysis.measure import measure_all
from datamodules.base import ImageTable
from datamodules.exclusion import Exclusion

CONF = Path(__file__).parents[3] / "conf"
LISTED = yaml.safe_load((CONF / "analyze.yaml").read_text())["reasons"]


def photo(seed, width=96, height=80):
    """Something with shapes, edges, colours and grain."""
    rng = np.random.default_rng(seed)
    soft, sharp = (Image.fromarray(rng.integers(0, 256, (n, n + 1, 3), np.uint8)) for n in (5, 9))
    soft = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), float)
    sharp = np.asarray(sharp.resize((width, height), Image.Resampling.NEAREST), float)
    grain = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray((0.6 * soft + 0.4 * sharp + grain).clip(0, 255).astype(np.uint8))


def jpeg(image, quality):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


def make_table(folder, pictures, labels=None):
    """A table of files, in the order of the names, decoded to 32 px."""
    files = []
    for name, picture in sorted(pictures.items()):
        files.append(folder / f"{name}.{'tif' if picture.mode == 'F' else 'png'}")
        picture.save(files[-1])
    return ImageTable(
        images=np.zeros((len(files), 3, 32, 32), np.uint8),
        labels=torch.tensor([(labels or {}).get(file.stem, 0) for file in files]),
        class_names=("iris", "rose"),
        names=tuple(file.stem for file in files),
        captions=("",) * len(files),
        digest="0",
        files=tuple(files),
    )


def run(table, splits=None, limits=None, reasons=LISTED):
    """Findings of the kinds that are listed: name -> (reason, kept)."""
    splits = splits or {"train": list(table.names)}
    rows = {split: np.array(sorted(table.names.index(n) for n in names)) for split, names in splits.items()}
    found = find(table, measure_all(table, rows), 32, limits or Limits(), reasons)
    assert {finding.reason for finding in found} <= set(REASONS)
    return found, {(f.name, f.reason, f.kept) for f in found if f.reason in LISTED}


@pytest.fixture
def clean():
    return {f"clean{k:02d}": photo(k) for k in range(20)}


def test_clean_photos_are_not_flagged(tmp_path, clean):
    found, listed = run(make_table(tmp_path, clean))
    assert listed == set()
    assert found == []


def test_every_planted_fault_is_found_and_nothing_else(tmp_path, clean):
    planted = {
        "small": photo(31, 40, 31),
        "wide": photo(32, 300, 90),
        "high": photo(33, 40, 120),
        "grey": jpeg(photo(34).convert("L").convert("RGB"), 80),
        "same": clean["clean03"],
        "twin": jpeg(clean["clean05"].resize((72, 60)), 50),
        "brighter": ImageEnhance.Brightness(clean["clean07"]).enhance(1.15),
    }
    table = replace(make_table(tmp_path, clean | planted), unreadable=(Exclusion("cut.jpg", "unreadable", "cut"),))
    found, listed = run(table)
    assert listed == {
        ("cut.jpg", "unreadable", ""),
        ("small", "too_small", ""),
        ("wide", "odd_aspect", ""),
        ("high", "odd_aspect", ""),
        ("grey", "grayscale", ""),
        ("same", "exact_duplicate", "clean03"),
        ("twin", "near_duplicate", "clean05"),
        # The larger one and then the first by name stays.
        ("clean07", "near_duplicate", "brighter"),
    }
    details = {(f.name, f.reason): f.details for f in found}
    assert details["small", "too_small"] == "40 x 31 pixels, below 32"
    assert details["wide", "odd_aspect"] == "300 x 90 pixels"


def test_dark_light_blurry_and_empty_images_are_seen(tmp_path, clean):
    planted = {
        "dark": Image.fromarray((np.asarray(photo(40)) // 16).astype(np.uint8)),
        "light": Image.fromarray((255 - np.asarray(photo(41)) // 40).astype(np.uint8)),
        "empty": Image.new("RGB", (96, 80), (120, 130, 90)),
        "blurry": photo(42).filter(ImageFilter.GaussianBlur(2)),
        "large": photo(43, 900, 750),
    }
    found, _ = run(make_table(tmp_path, clean | planted))
    reasons = {(f.name, f.reason) for f in found}
    assert {("dark", "dark"), ("light", "light"), ("empty", "low_information"), ("blurry", "blurry")} <= reasons
    assert ("large", "odd_size") in reasons
    assert not {name for name, _ in reasons if name.startswith("clean")}


def test_twins_across_splits_go_from_the_training_images(tmp_path, clean):
    twins = {
        "a_train": clean["clean01"],  # its twin is in test
        "b_val": jpeg(clean["clean02"], 60),  # in test
        "c_train": jpeg(photo(50), 60),  # in val
        "c_val": photo(50),
        "d1_train": photo(51),  # both in train, the larger stays
        "d2_train": photo(51).resize((192, 160), Image.Resampling.BICUBIC),
    }
    table = make_table(tmp_path, clean | twins, labels={"a_train": 1})
    splits = {
        "train": [n for n in table.names if n.endswith("train") or n > "clean05"],
        "val": [n for n in table.names if n.endswith("val")],
        "test": [n for n in table.names if n.startswith("clean") and n <= "clean05"],
    }
    splits["train"] = [n for n in splits["train"] if n not in splits["val"]]
    found, listed = run(table, splits)
    assert listed == {
        ("a_train", "exact_duplicate", "clean01"),
        ("b_val", "near_duplicate", "clean02"),
        ("c_train", "near_duplicate", "c_val"),
        ("d1_train", "near_duplicate", "d2_train"),
    }
    by_name = {f.name: f for f in found}
    assert by_name["a_train"].details == ("the same pixels; its twin is in test; its twin is labelled iris, it rose")
    assert by_name["a_train"].split == "train"
    assert "its twin is in val" in by_name["c_train"].details
    assert "twin is in" not in by_name["d1_train"].details


def test_a_twin_that_goes_anyway_does_not_stay(tmp_path, clean):
    wide = photo(60, 300, 90)
    table = make_table(tmp_path, clean | {"a": wide, "b": wide, "small": clean["clean04"].resize((36, 30))})
    _, listed = run(table, {"train": [n for n in table.names if n != "small"], "test": ["small"]})
    assert ("small", "near_duplicate", "clean04") in listed  # though it is in test
    assert ("b", "exact_duplicate", "a") in listed


def test_only_the_reasons_that_are_listed_make_a_twin_go(tmp_path, clean):
    grey = np.asarray(photo(34).convert("L").convert("RGB")).clip(0, 240)
    pictures = {
        "grey_test": Image.fromarray(grey),
        "tinted_train": Image.fromarray(grey + np.array([12, 0, 0], np.uint8)),
        "large_test": photo(43).resize((900, 750), Image.Resampling.BICUBIC),
        "usual_train": photo(43),
    }
    table = make_table(tmp_path, clean | pictures)
    test = [name for name in pictures if name.endswith("test")]
    splits = {"train": [n for n in table.names if n not in test], "test": test}
    for reasons, grey_goes, large_goes in (
        (LISTED, True, False),
        ([reason for reason in LISTED if reason != "grayscale"], False, False),
        ([*LISTED, "odd_size"], True, True),
    ):
        found, _ = run(table, splits, reasons=reasons)
        assert {("grey_test", "grayscale"), ("large_test", "odd_size")} <= {(f.name, f.reason) for f in found}
        grey_pair, large_pair = ("grey_test", "tinted_train"), ("large_test", "usual_train")
        assert {(f.name, f.kept) for f in found if f.kept} == {
            grey_pair if grey_goes else grey_pair[::-1],
            large_pair if large_goes else large_pair[::-1],
        }


def test_the_same_bytes_in_another_shape_are_no_exact_duplicate(tmp_path, clean):
    flat = {
        "wide_flat": Image.new("RGB", (96, 80), (9, 99, 199)),
        "high_flat": Image.new("RGB", (80, 96), (9, 99, 199)),
    }
    _, listed = run(make_table(tmp_path, clean | flat))
    assert "exact_duplicate" not in {reason for _, reason, _ in listed}


def test_thousands_of_copies_are_compared_once(monkeypatch):
    # A placeholder 3,000 times, the same one a little brighter, and noise.
    images = np.zeros((3002, 3, 32, 32), np.uint8)
    images[:3000, :, 8:24, 8:24] = 200
    images[3000] = images[0] + 5
    images[3001] = np.random.default_rng(0).integers(0, 256, (3, 32, 32))
    table = plain_table(images)
    compared = []

    def counted(table, rows, *others):
        compared.append(rows.tolist())
        return near_twins(table, rows, *others)

    monkeypatch.setattr(cleansing, "near_twins", counted)
    splits = {"train": np.delete(np.arange(3002), 2000), "test": np.array([2000])}
    found = find(table, measure_all(table, splits), 32, Limits(), LISTED)
    exact = [finding for finding in found if finding.reason == "exact_duplicate"]
    assert len(exact) == 2999
    assert {finding.kept for finding in exact} == {"2000"}  # the one in test
    assert [(f.name, f.kept) for f in found if f.reason == "near_duplicate"] == [("3000", "2000")]
    assert [sorted(rows) for rows in compared] == [[2000, 3000, 3001]]


def test_where_most_are_grey_grey_is_no_fault(tmp_path, clean):
    grey = {f"grey{k:02d}": photo(100 + k).convert("L").convert("RGB") for k in range(25)}
    _, listed = run(make_table(tmp_path, clean | grey))
    assert listed == set()


def test_alike_is_not_the_same(tmp_path):
    # One layout in other colours and with other things: hashes of the grey image are close, pictures are not.
    base = np.asarray(photo(70), np.int16)
    other = base[..., [2, 0, 1]]
    spot = base.copy()
    spot[20:60, 30:70] = spot[20:60, 30:70] // 4
    pictures = {"base": base, "other": other, "spot": spot}
    table = make_table(
        tmp_path, {name: Image.fromarray(p.clip(0, 255).astype(np.uint8)) for name, p in pictures.items()}
    )
    measured = measure_all(table, {"train": np.arange(3)})
    rows = measured.frame["row"].to_numpy()
    assert not list(near_twins(table, rows, measured.hashes, Limits(hash_bits=64)))
    loose = list(near_twins(table, rows, measured.hashes, Limits(hash_bits=64, difference=255)))
    assert [pair for *pair, _ in loose] == [[0, 1], [0, 2]]
    for a, b, value in loose:
        small = [np.asarray(table.original(k).resize((32, 32), Image.Resampling.BOX), float) for k in (a, b)]
        assert value == pytest.approx((small[0] - small[1]).std(), rel=1e-4)


def test_near_twins_do_not_depend_on_the_chunks(tmp_path, clean):
    copies = {f"x{k:02d}": jpeg(clean[f"clean{k:02d}"], 70) for k in range(0, 20, 3)}
    table = make_table(tmp_path, clean | copies)
    measured = measure_all(table, {"train": np.arange(len(table))})
    rows = measured.frame["row"].to_numpy()
    whole = list(near_twins(table, rows, measured.hashes, Limits()))
    assert {(table.names[a], table.names[b]) for a, b, _ in whole} == {(f"clean{n[1:]}", n) for n in copies}
    assert list(near_twins(table, rows, measured.hashes, Limits(), chunk=4)) == whole


def plain_table(images):
    return ImageTable(
        images=images,
        labels=torch.zeros(len(images), dtype=torch.int64),
        class_names=("rose",),
        names=tuple(f"{k:04d}" for k in range(len(images))),
        captions=("",) * len(images),
        digest="0",
    )


@pytest.mark.parametrize("chunk", [3, 256])
def test_near_twins_are_those_of_all_pairs(chunk):
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (5, 3, 32, 32))
    images = (kinds[rng.integers(0, 5, 40)] + rng.normal(0, 12, (40, 3, 32, 32))).clip(0, 255).astype(np.uint8)
    rows = rng.permutation(40)
    hashes = rng.integers(0, 2**20, 40).astype(np.uint64)
    limits = Limits(hash_bits=10, difference=18)
    pictures = images[rows].astype(np.float64)
    apart = (pictures[:, None] - pictures).std((2, 3, 4))
    bits = [[int(a ^ b).bit_count() for b in hashes] for a in hashes]
    pairs = {(a, b) for a in range(40) for b in range(a) if apart[a, b] <= 18 and bits[a][b] <= 10}
    assert len(pairs) > 20
    found = list(near_twins(plain_table(images), rows, hashes, limits, chunk))
    assert {(a, b) for a, b, _ in found} == set(_twins(np.arange(40), pairs))
    assert all(value == pytest.approx(apart[a, b], rel=1e-5) for a, b, value in found)


def test_what_went_is_compared_no_more(monkeypatch):
    images = np.random.default_rng(0).integers(0, 9, (600, 3, 32, 32)).astype(np.uint8)  # of a still camera in the dark
    compared = []

    def counted(some, others):
        compared.append(len(others))
        return differences(some, others)

    differences = cleansing._differences
    monkeypatch.setattr(cleansing, "_differences", counted)
    same = np.zeros(600, np.uint64)
    found = list(near_twins(plain_table(images), np.arange(600), same, Limits()))
    assert [(stays, goes) for stays, goes, _ in found] == [(0, k) for k in range(1, 600)]
    assert sum(compared) == 599


def test_what_stays_is_no_twin_of_anything_that_stays():
    rng = np.random.default_rng(0)
    for _ in range(50):
        pairs = {(int(a), int(b)) for a, b in rng.integers(0, 12, (14, 2)) if a != b}
        order = rng.permutation(12)
        gone = {b: a for a, b in _twins(order, pairs)}
        stay = set(range(12)) - set(gone)
        both = pairs | {(b, a) for a, b in pairs}
        assert not any(a in stay and b in stay for a, b in pairs)
        rank = {int(k): place for place, k in enumerate(order)}
        for other, kept in gone.items():
            assert kept in stay
            assert (kept, other) in both
            assert rank[kept] < rank[other]


def test_other_split_names_come_last():
    import pandas as pd

    frame = pd.DataFrame(
        {"name": list("abcd"), "split": ["extra", "train", "test", "val"], "width": [9] * 4, "height": [9] * 4}
    )
    assert _by_precedence(frame, set()).tolist() == [2, 3, 1, 0]
    assert _by_precedence(frame, {"c"}).tolist() == [3, 1, 0, 2]


def test_grey_data_sets_have_no_grey_images():
    table = ImageTable(
        images=np.random.default_rng(0).integers(0, 256, (8, 1, 28, 28), np.uint8),
        labels=torch.zeros(8, dtype=torch.int64),
        class_names=("digit",),
        names=tuple("abcdefgh"),
        captions=("",) * 8,
        digest="0",
    )
    found = find(table, measure_all(table, {"train": np.arange(8)}), 28, Limits(), LISTED)
    assert not [finding for finding in found if finding.reason in LISTED]
    assert Exclusion("a") not in found
