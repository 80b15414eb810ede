"""The data of a model are those of its training."""

import numpy as np
import pytest
from PIL import Image

from diffusion.build import rebuild
from diffusion.evaluation.reals import split_identities
from diffusion.evaluation.subject import Subject, load_data

# In the order of a config, which is not that of the alphabet.
FRACTIONS = {"train": 0.6, "val": 0.3, "test": 0.1}


def config(folder, **changes):
    node = {"_target_": "datamodules.folders.PlainFolder", "path": str(folder), "size": 8, "batch_size": 2, "seed": 0}
    return {"data": {"name": "plain", **node, "split": FRACTIONS, "split_seed": 1, **changes}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for k in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{k}.png")
    return tmp_path / "images"


def trained_on(node):
    data = rebuild(node["data"], "data")
    data.prepare_data()
    data.setup()
    return data


def test_every_split_holds_the_images_of_the_training(folder):
    there, here = trained_on(config(folder)), load_data(config(folder))
    assert {name: len(rows) for name, rows in here.splits.items()} == {"train": 24, "val": 12, "test": 4}
    for name, rows in there.splits.items():
        assert np.array_equal(rows, here.splits[name])


def test_a_split_of_other_images_is_named(folder):
    known = Subject(None, {}, "last.ckpt", "ab", None, splits=split_identities(trained_on(config(folder))))
    assert known.other_splits(load_data(config(folder))) == []
    assert known.other_splits(load_data(config(folder, split_seed=2))) == ["train", "val", "test"]
    assert known.other_splits(load_data(config(folder, split={"train": 0.6, "val": 0.4}))) == ["val", "test"]
    assert Subject(None, {}, "old.ckpt", "ab", None).other_splits(load_data(config(folder))) == []
