"""Trains what a config describes: `python train.py experiment=flowers`; `--help` says more."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from diffusion import cli


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
def main(cfg: DictConfig) -> float:
    """Composes, trains, and returns the objective to a sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    if (objective := cli.read_result(folder, config["trainer"])) is not None:
        return objective
    # Only now torch and lightning: help, --cfg and a finished run do not wait for them.
    from diffusion.training import train

    return train({str(key): value for key, value in config.items()}, folder)


if __name__ == "__main__":
    cli.run(main)
