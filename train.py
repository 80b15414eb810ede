"""Trains what a config describes: `python train.py experiment=flowers`; `--help` says more."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from diffusion import cli
from diffusion.ranks import leader

JOB = "diffusion.training.train"
"""What every rank does; its module imports torch, which help, --cfg and a finished run do not wait for."""


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
def main(cfg: DictConfig) -> float:
    """Composes, trains, and returns the objective to a sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    settings = {str(key): value for key, value in config.items()}
    if (objective := cli.read_result(folder, settings)) is not None:
        return objective
    return float(leader.run(JOB, settings, folder))


if __name__ == "__main__":
    cli.run(main, several=True)
