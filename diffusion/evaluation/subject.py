"""What is evaluated: a model from a checkpoint, with its config and its data."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusion.build import rebuild
from diffusion.checkpoint import load_model, model_settings, read
from diffusion.errors import AntherError
from diffusion.evaluation.reals import split_identities
from diffusion.files import sha256
from diffusion.modules.generator import Generator

CONF = Path(__file__).parents[2] / "conf"


@dataclass(frozen=True)
class Subject:
    """A model that draws, and where it comes from.

    Attributes:
        model: in evaluation mode, with averaged weights where the checkpoint has them.
        config: that of its training, plain; `data` describes its data.
        path: of the checkpoint.
        sha256: of the checkpoint.
        validation_loss: of these weights, where the checkpoint knows it.
        model_config_sha256: of what describes weights from elsewhere as a model; None for a checkpoint of train.py.
        splits: `reals.identity_of` the images of each split of the training, where the checkpoint knows them.
    """

    model: Generator
    config: Mapping[str, Any]
    path: str
    sha256: str
    validation_loss: float | None
    model_config_sha256: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Numbers in the network."""
        return sum(p.numel() for p in self.model.trained.parameters())

    def other_splits(self, datamodule: Any) -> list[str]:
        """The splits of the training in which the data have other images now, as far as the checkpoint knows them."""
        here = split_identities(datamodule)
        return [name for name, identity in self.splits.items() if here.get(name) != identity]


# One is enough: the jobs of a sweep follow each other in one process and evaluate the same checkpoint.
@lru_cache(maxsize=1)
def _load(path: str, digest: str, described_by: str | None) -> Subject:
    config = None if described_by is None else described(described_by)
    model = load_model(path, config)
    loss = model_config_sha256 = None
    splits: Mapping[str, str] = {}
    if config is not None:
        settings = json.dumps(model_settings(config), sort_keys=True)
        model_config_sha256 = hashlib.sha256(settings.encode()).hexdigest()
    else:
        checkpoint = read(path)
        config = checkpoint["config"]
        record = checkpoint.get("callbacks", {}).get("RunRecord", {})
        validated, splits = record.get("validated", {}), record.get("splits", {})
        loss = validated.get("val") if validated.get("step") == checkpoint.get("global_step") else None
    return Subject(model, config, path, digest, loss, model_config_sha256, splits)


def load_subject(path: str | Path, described_by: str | None = None) -> Subject:
    """The model of a checkpoint; loaded once for the jobs of a sweep.

    Args:
        path: a checkpoint of train.py, or weights from elsewhere.
        described_by: for weights from elsewhere; see `described`.

    Raises:
        AntherError: see `diffusion.checkpoint.load_model`.
    """
    if not Path(path).is_file():
        raise AntherError(
            f"there is no checkpoint at {path}: give ckpt= the path of one, as in ckpt=runs/demo/…/last.ckpt."
        )
    return _load(str(path), sha256(path), described_by)


def described(name: str) -> dict[str, Any]:
    """The config of a model that was trained elsewhere.

    Args:
        name: an experiment of train.py, such as `flowers_course`, or the path of a run's `.hydra/config.yaml`.

    Raises:
        AntherError: neither is there, or the file describes no model.
    """
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf

    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise AntherError(f"there is no file {name}: give model= an experiment of train.py or the config of a run.")
        try:
            config = OmegaConf.load(name)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise AntherError(f"{name} cannot be read as YAML: give model= the config of a run of train.py.") from error
    else:
        # A rank that others started has no Hydra; who composed the config has one, with what --config-dir adds.
        ready = GlobalHydra.instance().is_initialized()
        try:
            with nullcontext() if ready else initialize_config_dir(str(CONF), version_base="1.3"):
                config = compose("train", [f"experiment={name}"])
        except HydraException as error:
            raise AntherError(
                f"model={name} is neither an experiment of train.py nor a YAML file: {' '.join(str(error).split())}"
            ) from error
    if not isinstance(config, DictConfig) or "module" not in config:
        raise AntherError(f"{name} describes no model (it has no `module`): give the config of a run of train.py.")
    # What speaks of the run itself, such as its folder, does not resolve here and is not needed.
    wanted = {key: config[key] for key in ("module", "data") if key in config}
    return {key: OmegaConf.to_container(node, resolve=True) for key, node in wanted.items()} | {
        "name": str(config.get("name", Path(name).stem)),
        "guided_elsewhere": config.get("guided_elsewhere"),
    }


@lru_cache(maxsize=1)
def _build_data(described_by: str) -> Any:
    datamodule = rebuild(json.loads(described_by), "data")
    datamodule.prepare_data()
    datamodule.setup()
    return datamodule


def load_data(config: Mapping[str, Any], **instead: Any) -> Any:
    """The datamodule of a model's training, set up; read once for the jobs of a sweep.

    Args:
        config: of the training.
        **instead: settings that replace those of the config, such as another `path`; None leaves one as it was.

    Raises:
        AntherError: the data set is missing.
    """
    if "data" not in config:
        raise AntherError(
            "the config of this model names no data: add a `data` node to it, or leave out what needs real images and "
            "names of classes with inception=null nearest=null and prompts of your own."
        )
    chosen = {key: value for key, value in instead.items() if value is not None}
    if unknown := [key for key in chosen if key not in config["data"]]:
        raise AntherError(
            f"the data of this model ({config['data'].get('_target_')}) have no {', '.join(unknown)} to set: leave "
            + " and ".join(f"data.{key}" for key in unknown)
            + " out."
        )
    node = {**config["data"], **chosen}
    # In its own order: that of the fractions in `split` decides which images are whose.
    return _build_data(json.dumps(node))
