"""The unconditional experiments with their own data modules: what they describe can be built."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion.build import build
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
