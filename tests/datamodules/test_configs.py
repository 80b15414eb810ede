"""Every config of a data set builds one, as train.py would."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from datamodules.base import ImageDataModule
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


def test_every_data_set_stands_in_the_guide():
    guide = (CONF.parent / "docs" / "data.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in guide] == []
