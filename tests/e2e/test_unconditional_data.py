"""The unconditional experiments with their own data modules: what they describe can be built."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion.build import build
from diffusion.checkpoint import load_model
from diffusion.evaluation.subject import described
from tests.e2e.conftest import Run
from tests.e2e.test_train import ROOT

EXPERIMENTS = {
    "flowers102": ((3, 64, 64), 42_855_427),
    "flowers102_seed004": ((3, 64, 64), 14_908_925),
    "flowers102_small": ((3, 32, 32), 2_185_491),
    "celeba": ((3, 64, 64), 42_855_427),
    "cifar10": ((3, 32, 32), 55_245_443),
    "vae_flowers102": ((3, 64, 64), 2_957_251),
    "autoencoder_kl": ((3, 64, 64), 13_859_495),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_data_and_network_fit_each_other(experiment: str, sampler: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", [f"experiment={experiment}", f"sampler={sampler}"])
    parts = {name: OmegaConf.to_container(composed[name], resolve=True) for name in ("data", "module")}
    module = build(parts["module"])
    shape, count = EXPERIMENTS[experiment]
    assert tuple(build(parts["data"]).image_shape) == module.image_shape == shape
    assert sum(p.numel() for p in module.trained.parameters()) == count
    assert (type(module.sampler).__name__ == sampler.upper()) == (module.T is not None)


SEED_004: dict[str, dict[str, object]] = {
    "flowers102_seed004": {
        "module._target_": "diffusion.modules.diffusion.Diffusion",
        "module.denoiser.schedule": {
            "_target_": "diffusion.schedules.Linear",
            "T": 200,
            "beta_start": 0.0001,
            "beta_end": 0.02,
        },
        "module.denoiser.target": "eps",
        "module.denoiser.loss": "huber",
        "module.denoiser.weighting._target_": "diffusion.weighting.unit",
        "module.times": "uniform",
        "module.optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.001},
        "module.sampler._target_": "diffusion.samplers.DDPM",
        "module.sampler.steps": None,
        "module.sampler.clip": False,
        "data.roles": {"train": "test", "val": "val", "test": "train"},
        "trainer.max_epochs": 40,
    },
    "vae_flowers102": {
        "module._target_": "diffusion.modules.autoencoder.VariationalAutoencoder",
        "module.loss": "bce",
        "module.kl_weight": 1.0,
        "module.optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.0001},
        "data.roles": None,
        "trainer.max_epochs": 100,
    },
}
BOTH = {
    "module.scheduler": None,
    "data.size": 64,
    "data.batch_size": 32,
    "trainer.max_steps": -1,
    "trainer.gradient_clip_val": None,
    "trainer.accumulate_grad_batches": 1,
    "callbacks.ema": None,
}


@pytest.mark.parametrize("experiment", SEED_004)
def test_the_settings_are_those_of_seed_004(experiment: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = compose("train", [f"experiment={experiment}"])
    expected = SEED_004[experiment] | BOTH
    found = {key: OmegaConf.select(composed, key) for key in expected}
    plain = {key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in found.items()}
    assert plain == expected


@pytest.mark.parametrize(
    "variant",
    [
        "network=resnet_unet",
        pytest.param("network=noattention_unet", marks=pytest.mark.slow),
        pytest.param("network.act=silu", marks=pytest.mark.slow),
        pytest.param("network.norm=post", marks=pytest.mark.slow),
    ],
)
def test_files_of_seed_004s_networks_load_by_the_guides_commands(
    variant: str, command: Run, call: Callable[..., Path], tmp_path: Path
) -> None:
    guide = (ROOT / "docs" / "unconditional.md").read_text()
    print_config, evaluate = re.findall(r"^python (.*theirs\.yaml)$", guide, re.MULTILINE)
    script, *words, _, written = shlex.split(print_config.replace("network=resnet_unet", variant))
    theirs = tmp_path / written
    theirs.write_text(command(script, *words).stdout)
    torch.manual_seed(3)
    node = described(str(theirs))["module"]["denoiser"]["network"]
    network = build(node)
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    model = load_model(tmp_path / "theirs.pth", described(str(theirs)))
    assert model.config["module"]["denoiser"]["network"] == node
    x, t = torch.randn(1, 3, 64, 64), torch.tensor([0.5])
    with torch.no_grad():
        assert torch.equal(model.trained(x, t, None), network.eval()(x, t, None))
    if variant == "network=resnet_unet":
        script, *words = shlex.split(evaluate.replace("theirs.", f"{tmp_path}/theirs."))
        quick = ["num_images=2", "sampler=ddim", "sampler.steps=1", "trainer=cpu"]
        without = ["inception=null", "nearest=null", "dataset=null", "embedding=null"]
        folder = call(script, *words, *quick, *without, folder=tmp_path / "evaluation")
        assert (folder / "metrics.json").exists()
