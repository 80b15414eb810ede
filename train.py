"""Trains what a config describes: `python train.py experiment=flowers`; `--help` says more."""

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion import cli, settings
from diffusion.ranks import leader


def job(config: dict[str, Any], folder: Path) -> float:
    """What every rank does."""
    # Only now torch and lightning: help, --cfg and a finished run do not wait for them.
    from diffusion.training import train

    return train(config, folder)


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
def main(cfg: DictConfig) -> float:
    """Composes, trains, and returns the objective to a sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = settings.read(cfg, settings.Train)
    if (objective := cli.read_result(folder, config["trainer"])) is not None:
        return objective
    objective = leader.run(job, config, folder)
    return float(objective)


if __name__ == "__main__":
    cli.run(main, job)
