import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.mnist import MNIST, read_idx, unpacked
from diffusion.errors import AntherError

needs_data = pytest.mark.skipif("ANTHER_TEST_DATA" not in os.environ, reason="needs ANTHER_TEST_DATA")
DATA = Path(os.environ.get("ANTHER_TEST_DATA", "")) / "mnist"


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("shape", [(7,), (3, 4, 5), (0,)])
def test_idx(shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    assert np.array_equal(read_idx(idx(array), Path("f")), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "f is no IDX file of bytes"),
        (b"\x1f\x8b\x08\x03", "f is no IDX file of bytes: it begins with 1f8b0803"),
        (struct.pack(">BBBBI", 0, 0, 13, 1, 1) + bytes(4), "f is no IDX file of bytes"),
        (struct.pack(">BBBBII", 0, 0, 8, 2, 1, 1) + bytes(1), "f is no IDX file of bytes"),
        (idx(np.zeros((3, 4, 5), np.uint8))[:-1], "f has 59 values where its header says 60"),
        (idx(np.zeros(4, np.uint8)) + b"\0", "f has 5 values where its header says 4"),
        (struct.pack(">BBBBI", 0, 0, 8, 3, 2), "f has 0 values where its header says nothing"),
    ],
)
def test_idx_is_read_strictly(content, message):
    with pytest.raises(AntherError, match=message):
        read_idx(content, Path("f"))


def test_damaged_gzip(tmp_path):
    content = gzip.compress(os.urandom(1000))
    changed = content[:500] + bytes([content[500] ^ 1]) + content[501:]
    for k, damaged in enumerate([content[:-1], content[:500], changed, b"plain"]):
        file = tmp_path / f"{k}.gz"
        file.write_bytes(damaged)
        with pytest.raises(AntherError, match=r"\.gz is damaged"):
            unpacked(file)


def test_missing_and_foreign_files(tmp_path):
    module = MNIST(batch_size=4, seed=0, path=str(tmp_path))
    with pytest.raises(AntherError, match=r"holds no train-images-idx3-ubyte .*raw.*leave it out"):
        module.prepare_data()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((60000, 28, 28), np.uint8)))
    with pytest.raises(AntherError, match="is not MNIST's train-images-idx3-ubyte: its checksum differs"):
        module.prepare_data()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0")
    with pytest.raises(AntherError, match="header says nothing"):
        module.prepare_data()


def test_bad_options():
    with pytest.raises(AntherError, match=r"data\.size=27"):
        MNIST(batch_size=4, seed=0, size=27)


@pytest.fixture(scope="module")
def mnist():
    module = MNIST(batch_size=128, seed=0, path=str(DATA))
    module.prepare_data()
    module.setup()
    return module


@needs_data
def test_all_seventy_thousand(mnist):
    table = mnist.table
    assert table.images.shape == (70000, 1, 28, 28)
    assert mnist.image_shape == (1, 28, 28)
    for name, part in (("train", slice(0, 60000)), ("t10k", slice(60000, None))):
        files = [DATA / f"{name}-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
        raw = [gzip.decompress(file.read_bytes()) for file in files]
        assert np.array_equal(table.images[part, 0].ravel(), np.frombuffer(raw[0], np.uint8, offset=16))
        assert np.array_equal(table.labels[part].numpy(), np.frombuffer(raw[1], np.uint8, offset=8))
    assert table.captions[0] == "the digit 5"
    assert table.names[0] == "train/00000"
    assert table.names[60000] == "test/00000"
    assert table.class_names == tuple("0123456789")


@needs_data
def test_splits_of_the_seed_without_its_leak(mnist):
    splits = mnist.splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 57000, "val": 3000, "test": 10000}
    assert not set(splits["train"]) & set(splits["val"])
    assert np.array_equal(splits["test"], np.arange(60000, 70000))
    assert max(splits["train"].max(), splits["val"].max()) < 60000
    assert len(mnist.train_dataloader()) == 57000 // 128
    first = next(iter(mnist.test_dataloader()))
    assert first["index"].tolist() == list(range(60000, 60128))


@needs_data
def test_other_layouts_give_the_same_table(mnist, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in DATA.glob("*.gz"):
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    module = MNIST(batch_size=128, seed=0, path=str(tmp_path))
    module.setup()
    assert module.table.digest == mnist.table.digest
    assert torch.equal(module.table.labels, mnist.table.labels)


@needs_data
def test_larger_sizes_have_a_black_border(mnist):
    module = MNIST(batch_size=4, seed=0, path=str(DATA), size=33)
    module.setup()
    assert module.image_shape == (1, 33, 33)
    assert np.array_equal(module.table.images[:100, :, 2:30, 2:30], mnist.table.images[:100])
    assert module.table.images[:100].sum() == mnist.table.images[:100].sum()
    assert module.table.digest != mnist.table.digest
