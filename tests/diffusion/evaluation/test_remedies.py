"""What a message tells a person to type is taken as it is printed."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion import settings
from diffusion.conditioning.openclip import find_clip
from diffusion.errors import AntherError
from diffusion.evaluation.distribution import check_number
from diffusion.evaluation.inception import Extractor

CONF = Path(__file__).resolve().parents[3] / "conf"


def typed(error, command, *words):
    """The config of a command with those words that a message names."""
    remedy = re.findall(r"[\w.]+\.\w+=[\w-]+", str(error.value))
    assert remedy
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, [*words, *remedy])


def inception(error):
    config = OmegaConf.to_container(typed(error, "evaluate", "ckpt=x"))
    settings.check(config, settings.Evaluate)
    return config["inception"]


def test_few_images():
    with pytest.raises(AntherError) as error:
        check_number(4, 4)
    check_number(4, 4, inception(error)["few_images"])


def test_grey_images():
    extractor = object.__new__(Extractor)
    grey = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
    extractor.one_channel = "refuse"
    with pytest.raises(AntherError) as error:
        extractor.check(grey)
    extractor.one_channel = inception(error)["one_channel"]
    extractor.check(grey)


@pytest.mark.parametrize(
    ("setting", "command", "words"),
    [
        ("clip", "evaluate", ["ckpt=x"]),
        ("conditioner", "train", ["experiment=flowers"]),
        ("callbacks.clip", "train", ["experiment=flowers"]),
    ],
)
def test_the_clip_of_the_project(setting, command, words):
    with pytest.raises(AntherError) as error:
        find_clip("anther-flowers-32", "laion2b_s34b_b79k", setting)
    node = OmegaConf.select(typed(error, command, *words, f"{setting}.model=anther-flowers-32"), setting)
    assert find_clip(node.model, node.pretrained, setting).own
