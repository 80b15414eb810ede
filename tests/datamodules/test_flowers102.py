import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102 as Reference

from datamodules.base import ImageTable
from datamodules.flowers102 import Flowers102, image_id
from diffusion.errors import AntherError

needs_data = pytest.mark.skipif("ANTHER_TEST_DATA" not in os.environ, reason="needs ANTHER_TEST_DATA")
DATA = Path(os.environ.get("ANTHER_TEST_DATA", ""))
N = 306  # three images of each species


pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture
def official(tmp_path):
    """The three files of the authors, small: every species has one image in each split, in no order."""
    folder = tmp_path / "flowers-102"
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(1, 103), 3)).astype(np.uint8)
    ids = np.stack([rng.permutation(np.flatnonzero(labels == k) + 1) for k in range(1, 103)])
    parts = {"trnid": ids[:, :1], "valid": ids[:, 1:2], "tstid": ids[:, 2:]}
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    savemat(
        folder / "setid.mat",
        {key: rng.permutation(part.ravel())[None].astype(np.uint16) for key, part in parts.items()},
    )
    with tarfile.open(folder / "102flowers.tgz", "w:gz") as archive:
        for k in range(1, N + 1):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(stream, "JPEG")
            info = tarfile.TarInfo(f"jpg/image_{k:05d}.jpg")
            info.size = stream.tell()
            stream.seek(0)
            archive.addfile(info, stream)
    return folder


def ready(path, **options):
    module = Flowers102(path=str(path), **{"batch_size": 4, "seed": 0, "size": 8} | options)
    module.prepare_data()
    module.setup()
    return module


def by_split(module):
    """(file name, name of its species) of every image, by split."""
    table = module.table
    return {
        split: {(table.files[row].name, table.class_names[int(table.labels[row])]) for row in rows}
        for split, rows in module.splits.items()
    }


@pytest.fixture
def reference(official, monkeypatch):
    """The same as torchvision reads it."""
    copy = official.parent / "reference" / "flowers-102"
    shutil.copytree(official, copy)
    with tarfile.open(copy / "102flowers.tgz") as archive:
        archive.extractall(copy, filter="data")
    monkeypatch.setattr(Reference, "_check_integrity", lambda self: True)
    sets = {split: Reference(copy.parent, split) for split in ("train", "val", "test")}
    return {
        split: {
            (Path(file).name, Reference.classes[label])
            for file, label in zip(data._image_files, data._labels, strict=True)
        }
        for split, data in sets.items()
    }


@pytest.mark.parametrize("where", ["archive", "folder around", "unpacked"])
def test_the_splits_and_labels_of_the_authors_as_torchvision_reads_them(official, reference, where):
    if where == "unpacked":
        with tarfile.open(official / "102flowers.tgz") as archive:
            archive.extractall(official, filter="data")
        (official / "102flowers.tgz").unlink()
    module = ready(official.parent if where == "folder around" else official)
    assert by_split(module) == reference
    assert {split: len(rows) for split, rows in module.splits.items()} == {"train": 102, "val": 102, "test": 102}
    assert module.class_names == tuple(Reference.classes)
    assert module.describe().endswith("; the splits of the authors")
    assert module.table.original(0).size == (12, 9)


def test_the_roles_of_seed_004(official, reference):
    swapped = ready(official, roles={"train": "test", "val": "val", "test": "train"})
    assert by_split(swapped) == {"train": reference["test"], "val": reference["val"], "test": reference["train"]}
    assert "train is the authors' test, test is the authors' train" in swapped.describe()
    assert swapped.split_record()["roles"] == {"train": "test", "val": "val", "test": "train"}


@pytest.fixture
def by_species(official, reference, tmp_path):
    """A zip with a folder per species, in title case."""
    with tarfile.open(official / "102flowers.tgz") as archive, zipfile.ZipFile(tmp_path / "set.zip", "w") as target:
        for name, species in set().union(*reference.values()):
            folder = "Lotus Lotus" if species == "lotus" else species.title()
            target.writestr(f"flowers102/{folder}/{name}", archive.extractfile(f"jpg/{name}").read())
    return tmp_path / "set.zip"


def test_a_folder_per_species_has_the_splits_of_the_authors_when_setid_lies_beside(by_species, official, reference):
    with pytest.raises(AntherError, match=r"setid\.mat, which is not beside .*fetch https.*setid\.mat .*data\.split="):
        ready(by_species)
    shutil.copy(official / "setid.mat", by_species.parent)
    module = ready(by_species)
    assert by_split(module) == reference
    assert module.class_names == tuple(Reference.classes)


def test_a_folder_per_species_may_be_split_by_seed(by_species):
    module = ready(by_species, split={"train": 0.5, "val": 0.25, "test": 0.25}, split_seed=3)
    assert {split: len(rows) for split, rows in module.splits.items()} == {"train": 153, "val": 76, "test": 77}
    assert module.describe().endswith("; split by seed 3")
    assert module.split_record()["official"] is False


@pytest.mark.parametrize("where", ["archive", "folder in a folder"])
def test_the_images_of_the_authors_alone(official, reference, tmp_path, where):
    if where == "archive":
        path = beside = official / "102flowers.tgz"
    else:
        path = tmp_path / "around"
        beside = path / "set"
        with tarfile.open(official / "102flowers.tgz") as archive:
            archive.extractall(path / "anything", filter="data")
    away = tmp_path / "away"
    away.mkdir()
    for name in ("imagelabels.mat", "setid.mat"):
        (official / name).rename(away / name)
    with pytest.raises(AntherError, match=rf"^{beside.parent}/imagelabels\.mat is missing; fetch https.* put it there"):
        ready(path)
    # A split by seed asks for no setid.mat.
    shutil.copy(away / "imagelabels.mat", beside.parent)
    module = ready(path, split={"train": 0.5, "val": 0.25, "test": 0.25})
    assert set().union(*by_split(module).values()) == set().union(*reference.values())
    with pytest.raises(AntherError, match=r"setid\.mat, which is not beside"):
        ready(path)
    (beside.parent / "imagelabels.mat").unlink()
    cached = tmp_path / "cache" / "assets" / "flowers102"
    shutil.copytree(away, cached)
    assert by_split(ready(path)) == reference


def test_some_species(official, by_species):
    shutil.copy(official / "setid.mat", by_species.parent)
    for path in (official, by_species):
        module = ready(path, classes=["rose", "lotus"])
        assert len(module.table) == 6
        assert module.class_names == ("rose", "lotus")
        assert {split: len(rows) for split, rows in module.splits.items()} == {"train": 2, "val": 2, "test": 2}
        assert set(module.table.captions) == {"A photo of a rose", "A photo of a lotus"}


def without(archive, names):
    """The zip again, without some entries."""
    cut = archive.with_name("cut.zip")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(cut, "w") as target:
        for name in source.namelist():
            if not names(name):
                target.writestr(name, source.read(name))
    return cut


def test_images_of_the_splits_that_are_not_there(official, by_species, caplog):
    shutil.copy(official / "setid.mat", by_species.parent)
    cut = without(by_species, lambda name: name.endswith(("image_00007.jpg", "image_00123.jpg")))
    said = (
        r"^2 of the 306 images of .*setid\.mat are not in .*cut\.zip, the first is image_00007\.jpg: get the images "
        r"again, or split by a seed with data\.split="
    )
    with pytest.raises(AntherError, match=said):
        ready(cut)
    with pytest.raises(AntherError, match=said):
        ready(cut, classes=["rose", "lotus"], on_corrupt="skip")
    assert len(ready(cut, split={"train": 0.5, "val": 0.25, "test": 0.25}).table) == 304
    # Where not every species is there, what is absent may be of another.
    few = without(by_species, lambda name: "/Rose/" not in name and "/Lotus" not in name)
    module = ready(few, classes=["rose", "lotus"])
    assert {split: len(rows) for split, rows in module.splits.items()} == {"train": 2, "val": 2, "test": 2}
    assert "300 of the 306 images" in caplog.text
    # Numbers that the labels do not have.
    savemat(official / "imagelabels.mat", {"labels": np.tile(np.arange(1, 103, dtype=np.uint8), 2)})
    with pytest.raises(AntherError, match=r"^102 of the 306 images .*the first is image_00205\.jpg: get"):
        ready(official)


def test_an_image_that_cannot_be_decoded_is_not_absent(official, by_species, caplog):
    shutil.copy(official / "setid.mat", by_species.parent)
    with zipfile.ZipFile(by_species) as archive:
        archive.extractall(by_species.parent / "set")
    damaged = next((by_species.parent / "set").rglob("image_00007.jpg"))
    damaged.write_bytes(b"")
    module = ready(by_species.parent / "set", on_corrupt="skip")
    assert sum(map(len, module.splits.values())) == 305
    assert "skipped 1 files" in caplog.text
    assert "the first is" not in caplog.text


@pytest.mark.parametrize("swapped", [False, True])
def test_all_8189_images_have_the_splits_of_the_authors(tmp_path, swapped):
    sizes = [6149, 1020, 1020] if swapped else [1020, 1020, 6149]
    parts = np.split(np.arange(1, 8190), np.cumsum(sizes)[:2])
    savemat(tmp_path / "setid.mat", dict(zip(("trnid", "valid", "tstid"), parts, strict=True)))
    names = tuple(f"image_{k:05d}.jpg" for k in range(1, 8190))
    table = ImageTable(np.zeros((8189, 1, 1, 1), np.uint8), torch.zeros(8189), ("rose",), names, names, "")
    module = Flowers102(path=str(tmp_path), batch_size=1, seed=0, size=1)
    module._setid, module._files = tmp_path / "setid.mat", [Path(name) for name in names]
    if swapped:
        with pytest.raises(AntherError, match=r"setid\.mat is damaged, since its parts have .*6149.*get it again"):
            module.make_splits(table)
    else:
        splits = module.make_splits(table)
        assert {name: len(rows) for name, rows in splits.items()} == {"train": 1020, "val": 1020, "test": 6149}


def test_faults(official, by_species, tmp_path):
    with pytest.raises(AntherError, match=r"data\.roles=.*must give train, val and test one of"):
        ready(official, roles={"train": "test", "val": "val", "test": "test"})
    with pytest.raises(AntherError, match="drop one of them"):
        ready(official, roles={"train": "test", "val": "val", "test": "train"}, split={"train": 0.5, "val": 0.5})
    with pytest.raises(AntherError, match="has rosebush, which is none of the 102 species"):
        ready(official, classes=["rosebush"])
    (official / "imagelabels.mat").rename(tmp_path / "labels")
    with pytest.raises(AntherError, match=r"imagelabels\.mat is missing; fetch https"):
        ready(official)
    (official / "imagelabels.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut off")
    with pytest.raises(AntherError, match=r"imagelabels\.mat has no row 'labels' that can be read"):
        ready(official)
    savemat(official / "imagelabels.mat", {"labels": np.ones((1, N + 2), np.uint8)})
    with pytest.raises(AntherError, match=r"2 images are missing, the first is .*image_00307\.jpg"):
        ready(official)
    with zipfile.ZipFile(by_species, "a") as archive:
        archive.writestr("flowers102/Triffid/image_00001.jpg", b"")
    with pytest.raises(AntherError, match="has a folder 'Triffid', which is none of the 102 species"):
        ready(by_species)
    assert image_id("rose/image_06765.jpg") == 6765
    with pytest.raises(AntherError, match="is not called"):
        image_id("rose/IMG_1.jpg")


@needs_data
def test_the_real_photos():
    module = ready(DATA / "flowers102.zip", split={"train": 0.8, "val": 0.2}, size=16)
    assert len(module.table) == 8189
    counts = np.bincount(module.table.labels.numpy(), minlength=102)
    # Known of the data set: 40 to 258 images per species, pink primrose 40, petunia 258.
    assert (counts.min(), counts.max()) == (40, 258)
    assert counts[Reference.classes.index("petunia")] == 258
    assert sorted(image_id(name) for name in module.table.names) == list(range(1, 8190))
