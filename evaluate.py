"""Evaluates a checkpoint: `python evaluate.py ckpt=...`; `--help` says more."""

import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion import cli, settings, sweeps
from diffusion.ranks import leader

JOB = "diffusion.evaluation.run.evaluate"
"""What every rank does; its module imports torch, which help does not wait for."""


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Composes, evaluates, and returns the objective to a sweep."""
    config = settings.read(cfg, settings.Evaluate)
    hydra_job = HydraConfig.get()
    config["overrides"] = list(hydra_job.overrides.task)
    config["sweep_dir"] = str(hydra_job.sweep.dir) if sweeps.in_sweep() else None
    objective: float | None = leader.run(JOB, config, Path(hydra_job.runtime.output_dir))
    return objective


if __name__ == "__main__":
    # The model comes from the checkpoint, so what an experiment says here is how its images are evaluated.
    sys.argv = [re.sub("^experiment=", "protocol=", word) for word in sys.argv]
    cli.run(main, several=True)
