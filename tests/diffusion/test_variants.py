"""A checkpoint of one variant never goes on as another, even where every tensor has the same shape."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion import checkpoint
from diffusion.build import build
from diffusion.errors import AntherError

CONF = Path(__file__).parents[2] / "conf"
BASE = ["experiment=cifar10", "data=embedded", "schedule=linear", "T=10", "network=convnext_unet", "network.dim=8"]


def config(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", [*BASE, *overrides])
    wanted = {"module": composed.module, "name": composed.name}
    return {
        key: OmegaConf.to_container(node, resolve=True) if key == "module" else node for key, node in wanted.items()
    }


VARIANTS = {
    "silu": ["network.act=silu"],
    "relu": ["network.act=relu"],
    "time": ["network.time_act=silu"],
    "post": ["network.norm=post"],
    "steps": ["T=20"],
    "target": ["target=eps"],
    "schedule": ["schedule=cosine"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_inside_is_held_against_that_of_the_run(variant):
    base, other = config(), config(*VARIANTS[variant])
    networks = [build(node["module"]).trained.state_dict() for node in (base, other)]
    assert [v.shape for v in networks[0].values()] == [v.shape for v in networks[1].values()]
    saved = {"config": base, "state_dict": {}}
    checkpoint.check_fits(saved, base, "there.ckpt")
    with pytest.raises(AntherError, match=r"there.ckpt holds another model: .* there and .* here"):
        checkpoint.check_fits(saved, other, "there.ckpt")


def test_quadratic_is_another_name_of_scaled_linear():
    assert config("schedule=quadratic") == config("schedule=scaled_linear") != config()


def test_sampler_is_one_word():
    samplers = [config(f"sampler={name}")["module"]["sampler"]["_target_"] for name in ("ddpm", "ddim")]
    assert samplers == ["diffusion.samplers.DDPM", "diffusion.samplers.DDIM"]


def test_published_weights_load_by_their_names_and_no_others(tmp_path):
    described = config()
    state = {f"module.{key}": value + 1 for key, value in build(described["module"]).trained.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    model = checkpoint.load_model(tmp_path / "theirs.pth", described)
    assert all(torch.equal(value, state[f"module.{key}"]) for key, value in model.trained.state_dict().items())
    with pytest.raises(AntherError, match="do not fit the given config"):
        checkpoint.load_model(tmp_path / "theirs.pth", config("network=resnet_unet", "network.dim=8"))
