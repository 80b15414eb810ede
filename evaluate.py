"""Evaluates a checkpoint: `python evaluate.py ckpt=...`; `--help` says more."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from diffusion import cli


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="evaluate")
def main(cfg: DictConfig) -> float | None:
    """Composes, evaluates, and returns the objective to a sweep."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    from diffusion.evaluation.run import evaluate

    job = HydraConfig.get()
    settings = {str(key): value for key, value in config.items()} | {"overrides": list(job.overrides.task)}
    return evaluate(settings, Path(job.runtime.output_dir))


if __name__ == "__main__":
    cli.run(main)
