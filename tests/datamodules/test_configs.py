"""Every config of a data set builds one, as train.py would."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from datamodules.base import ImageDataModule, random_split
from datamodules.folders import FolderImages
from diffusion.build import build

CONF = Path(__file__).parents[2] / "conf"
NAMES = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
OWN = {name: ["data.path=somewhere"] for name in ("folder", "class_folders", "pairs")}


@pytest.mark.parametrize("name", NAMES)
def test_it_composes_and_builds(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("analyze", [f"data={name}", "data.batch_size=4", *OWN.get(name, [])])
    module = build(OmegaConf.to_container(cfg.data, resolve=True))
    assert isinstance(module, ImageDataModule)
    assert module.batch_size == 4
    assert module.exclude is None
    assert module.name
    # A config is closed: a setting that it lacks cannot be given.
    if isinstance(module, FolderImages):
        assert cfg.data.crop is None


SEEDED = ("celeba_hq", "class_folders", "cropped_flowers", "flowers102", "flowers210", "folder", "pairs", "tf_flowers")


@pytest.mark.parametrize("name", SEEDED)
def test_a_test_split_can_be_held_out(name):
    words = [f"data={name}", *OWN.get(name, []), "data.split={train: 0.8, val: 0.1, test: 0.1}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("analyze", words)
    module = build(OmegaConf.to_container(cfg.data, resolve=True))
    sizes = {split: len(rows) for split, rows in random_split(100, module.split, module.split_seed).items()}
    assert sizes == {"train": 80, "val": 10, "test": 10}


def test_all_five_species_of_tf_flowers(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path / "cache"))
    nouns = {"daisy": "daisy", "dandelion": "dandelion", "roses": "rose", "sunflowers": "sunflower", "tulips": "tulip"}
    for k, folder in enumerate(nouns):
        (tmp_path / "flower_photos" / folder).mkdir(parents=True)
        Image.new("RGB", (9, 8), (40 * k, 0, 0)).save(tmp_path / "flower_photos" / folder / "1.jpg")
    words = ["data=tf_flowers", "data.classes=null", f"data.path={tmp_path / 'flower_photos'}", "data.size=8"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("analyze", words)
    table = build(OmegaConf.to_container(cfg.data, resolve=True)).load()
    assert table.class_names == tuple(nouns)
    assert table.captions == tuple(f"A photo of a {noun}" for noun in nouns.values())


def test_every_data_set_stands_in_the_guide():
    guide = (CONF.parent / "docs" / "data.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in guide] == []
