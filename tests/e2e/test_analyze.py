"""analyze.py as people run it, on drawn flowers and on a folder with faults."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.celeba import read_attributes, read_partition
from datamodules.exclusion import read_exclusions
from datamodules.folders import FolderImages
from tests.datamodules.test_celeba import write_files

Call = Callable[..., Path]
Refused = Callable[..., str]
WRITTEN = {"report.html", "analysis.json", "images.csv", "findings.csv", "exclude.csv", "plots"}


def photo(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((96, 80), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(coarse) + rng.normal(0, 6, (80, 96, 1))).clip(0, 255).astype(np.uint8))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Twenty-four photos in two classes, and one of each fault."""
    folder = tmp_path / "faulty"
    for k in range(24):
        path = folder / ("iris", "rose")[k % 2] / f"{k:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(k).save(path, quality=92)
    content = (folder / "iris" / "02.jpg").read_bytes()
    (folder / "iris" / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "rose" / "same.jpg").write_bytes((folder / "iris" / "04.jpg").read_bytes())  # in another class
    with Image.open(folder / "rose" / "05.jpg") as image:
        image.resize((72, 60)).save(folder / "rose" / "twin.jpg", quality=50)
    photo(90).resize((20, 24)).save(folder / "iris" / "small.png")
    photo(91).resize((300, 60)).save(folder / "iris" / "wide.png")
    photo(92).convert("L").save(folder / "rose" / "grey.jpg")
    return folder


def test_drawn_flowers(call: Call, capfd: pytest.CaptureFixture[str]) -> None:
    folder = call("analyze.py", "data.n_train=40", "data.n_val=8")
    assert {path.name for path in folder.iterdir()} >= WRITTEN
    content = json.loads((folder / "analysis.json").read_text())
    assert content["images"] == {"train": 40, "val": 8}
    assert content["sizes"]["width"] == dict.fromkeys(content["sizes"]["width"], 32.0) | {"std": 0.0}
    assert "are no files" in content["protocol"]["originals"]
    assert sum(content["labels"]["train"].values()) == 40
    lines = (folder / "images.csv").read_text().splitlines()
    assert len(lines) == 49
    page = (folder / "report.html").read_text()
    pictures = sorted(path.stem for path in (folder / "plots").glob("*.png"))
    assert {"images", "sizes", "resolutions", "measures", "channels", "labels"} <= set(pictures)
    assert len(re.findall("data:image/png;base64,", page)) == len(pictures)
    # Nothing on the page comes from elsewhere.
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    out = capfd.readouterr().out
    for path in (folder / "report.html", folder / "exclude.csv"):
        assert str(path) in out


def test_a_folder_with_one_of_each_fault(call: Call, faulty: Path, tmp_path: Path) -> None:
    data = ["data=class_folders", f"data.path={faulty}", "data.size=32", "data.split={train: 0.7, val: 0.3}"]
    folder = call("analyze.py", *data)
    listed = read_exclusions(folder / "exclude.csv")
    faults = {(e.name, e.reason) for e in listed if not e.kept}
    assert faults == {
        ("iris/cut.jpg", "unreadable"),
        ("iris/small.png", "too_small"),
        ("iris/wide.png", "odd_aspect"),
        ("rose/grey.jpg", "grayscale"),
    }
    twins = {frozenset((e.name, e.kept)): e for e in listed if e.kept}
    exact = twins.pop(frozenset(("iris/04.jpg", "rose/same.jpg")))
    near = twins.pop(frozenset(("rose/05.jpg", "rose/twin.jpg")))
    assert (exact.reason, near.reason) == ("exact_duplicate", "near_duplicate")
    assert "its twin is labelled" in exact.details
    assert not twins
    content = json.loads((folder / "analysis.json").read_text())
    assert content["excluded"] == 6
    assert {reason: c["images"] for reason, c in content["findings"].items() if c["listed"]} == {
        "unreadable": 1,
        "too_large": 0,
        "non_finite": 0,
        "too_small": 1,
        "odd_aspect": 1,
        "grayscale": 1,
        "exact_duplicate": 1,
        "near_duplicate": 1,
    }
    assert len(list(faulty.rglob("*.*"))) == 30

    # The list is honoured, by the data module itself, and nothing is left for a second look.
    module = FolderImages(
        path=str(faulty),
        size=32,
        batch_size=2,
        seed=0,
        split={"train": 0.7, "val": 0.3},
        exclude=str(folder / "exclude.csv"),
    )
    module.setup()
    assert sum(len(rows) for rows in module.splits.values()) == 24
    assert module.describe().endswith(f"; 6 left out by {folder / 'exclude.csv'}")
    again = call("analyze.py", *data, f"data.exclude={folder / 'exclude.csv'}", folder=tmp_path / "again")
    assert read_exclusions(again / "exclude.csv") == listed
    assert json.loads((again / "analysis.json").read_text())["images"] == {
        split: len(rows) for split, rows in module.splits.items()
    }
    assert not [f for f in read_exclusions(again / "findings.csv") if f.reason in {e.reason for e in listed}]


def test_classes_without_an_image_are_named(call: Call, faulty: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (faulty / "broken").mkdir()
    (faulty / "broken" / "a.png").write_bytes(b"no picture")
    (faulty / "empty").mkdir()
    folder = call("analyze.py", "data=class_folders", f"data.path={faulty}", "data.size=32")
    assert json.loads((folder / "analysis.json").read_text())["empty_classes"] == ["broken", "empty"]
    assert {"broken/a.png", "iris/cut.jpg"} == {
        finding.name for finding in read_exclusions(folder / "exclude.csv") if finding.reason == "unreadable"
    }
    assert "no image to be decoded: broken, empty; fill" in capfd.readouterr().out
    assert "that can be decoded: broken, empty." in (folder / "report.html").read_text()


def test_the_attributes_of_celeba(call: Call, tmp_path: Path) -> None:
    files = write_files(tmp_path)
    folder = call("analyze.py", "data=celeba", f"data.path={files}", "data.size=16", "data.batch_size=2")
    found = json.loads((folder / "analysis.json").read_text())["attributes"]
    names, values = read_attributes(files / "list_attr_celeba.txt")
    parts = read_partition(files / "list_eval_partition.txt")
    for k, split in enumerate(("train", "val", "test")):
        shares = np.mean([values[name] for name, part in parts.items() if part == k], 0)
        assert found[split] == pytest.approx(dict(zip(names, shares, strict=True)))
    assert Image.open(folder / "plots" / "attributes.png").width > 300
    assert "Share of the images with each attribute" in (folder / "report.html").read_text()


def test_other_reasons_and_limits(call: Call, faulty: Path) -> None:
    data = ["data=folder", f"data.path={faulty}", "data.size=16"]
    folder = call("analyze.py", *data, "reasons=[odd_size,exact_duplicate]", "limits.difference=0")
    assert {e.reason for e in read_exclusions(folder / "exclude.csv")} == {"odd_size", "exact_duplicate"}
    found = {f.reason for f in read_exclusions(folder / "findings.csv")}
    assert "near_duplicate" not in found
    assert "too_small" not in found
    assert {"grayscale", "unreadable"} <= found


def test_faults_end_with_a_sentence(refused: Refused, tmp_path: Path) -> None:
    assert "ugly" in refused("analyze.py", "reasons=[ugly]")
    assert "near_duplicate" in refused("analyze.py", "reasons=[ugly]")
    assert "nowhere" in refused("analyze.py", "data=class_folders", f"data.path={tmp_path}/nowhere")
    assert "data.path is not set" in refused("analyze.py", "data=folder")
    sentence = refused("train.py", "experiment=demo", "trainer.accelerator=cpu", f"data.exclude={tmp_path}/no.csv")
    assert "no.csv cannot be read" in sentence
    sentence = refused("analyze.py", "data=celeba", f"data.path={tmp_path}/celeba")
    assert "list_eval_partition.txt" in sentence
    assert "img_align_celeba.zip" in sentence
