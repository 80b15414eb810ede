"""Draws images from a checkpoint: `python sample.py ckpt=... prompts='[a red rose]'`; `--help` says more."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion import cli, settings
from diffusion.ranks import leader

JOB = "diffusion.drawing.draw"
"""What is done; its module imports torch, which help does not wait for."""


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="sample")
def main(cfg: DictConfig) -> None:
    """Composes and draws."""
    config = settings.read(cfg, settings.Sample)
    hydra_job = HydraConfig.get()
    config["overrides"] = list(hydra_job.overrides.task)
    leader.run(JOB, config, Path(hydra_job.runtime.output_dir))


if __name__ == "__main__":
    cli.run(main, several=True)
