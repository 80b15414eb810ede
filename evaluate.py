"""Evaluates a checkpoint: `python evaluate.py ckpt=...`; `--help` says more."""

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion import cli, settings
from diffusion.ranks import leader


def job(config: dict[str, Any], folder: Path) -> float | None:
    """What every rank does."""
    from diffusion.evaluation.run import evaluate

    return evaluate(config, folder)


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Composes, evaluates, and returns the objective to a sweep."""
    config = settings.read(cfg, settings.Evaluate)
    hydra_job = HydraConfig.get()
    config["overrides"] = list(hydra_job.overrides.task)
    objective: float | None = leader.run(job, config, Path(hydra_job.runtime.output_dir))
    return objective


if __name__ == "__main__":
    cli.run(main, job)
