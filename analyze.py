"""Analyses a data set: `python analyze.py data=flowers102`; `--help` says more."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from diffusion import cli


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="analyze")
def main(cfg: DictConfig) -> None:
    """Composes and analyses, in one process."""
    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    # Only now torch: help and --cfg do not wait for it.
    from datamodules.analysis.run import analyze

    analyze({str(key): value for key, value in config.items()}, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    cli.run(main)
