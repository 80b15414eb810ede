"""Trains what a config describes: `python train.py experiment=flowers`; `--help` says more."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion import cli, settings
from diffusion.ranks import leader

JOB = "diffusion.training.train"
"""What every rank does; its module imports torch, which help, --cfg and a finished run do not wait for."""


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Composes, trains, and returns the objective to a sweep."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = settings.read(cfg, settings.Train)
    record = cli.read_result(folder, config)
    objective: float | None = leader.run(JOB, config, folder) if record is None else record["objective"]
    return objective


if __name__ == "__main__":
    cli.run(main, several=True)
