"""Checkpoints: what one is, whether it fits, and the model inside."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion.build import build
from diffusion.errors import AntherError
from diffusion.modules.diffusion import Diffusion


def read(path: Path | str) -> dict[str, Any]:
    """A checkpoint as the dict that was saved; nothing in it is executed, tensors stay on the CPU.

    Raises:
        AntherError: there is no such file, it is damaged, it holds more than plain data, or no config.
    """
    path = Path(path)
    if not path.is_file():
        raise AntherError(
            f"there is no checkpoint at {path}: give ckpt= the path of a file such as checkpoints/last.ckpt."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises a dozen types here, all of them meaning the same to the user
        raise AntherError(
            f"{path} is not a whole checkpoint (truncated, of another kind, or with more than plain data in it): use "
            "another one."
        ) from error
    if not isinstance(checkpoint, dict) or "config" not in checkpoint or "state_dict" not in checkpoint:
        raise AntherError(f"{path} was not written by train.py (it has no config inside): use a checkpoint of a run.")
    return checkpoint


def check_fits(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path | str) -> None:
    """Refuses to go on with a checkpoint whose model is not the one that the config describes.

    Raises:
        AntherError: naming what differs.
    """
    here, there = dict(_model(config)), dict(_model(checkpoint["config"]))
    different = [key for key in sorted(here.keys() | there.keys()) if here.get(key) != there.get(key)]
    if different:
        shown = ", ".join(f"{key} = {there.get(key)} there and {here.get(key)} here" for key in different[:4])
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise AntherError(
            f"{path} holds another model: {shown}{more}; give the same settings, or another hydra.run.dir or ckpt."
        )


def _model(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings that make one model another, flattened."""
    module = config["module"]
    parts = {key: module[key] for key in ("_target_", "denoiser", "conditioner", "augment_dim") if key in module}
    # These change what is learnt, not what the weights mean.
    parts["denoiser"] = {k: v for k, v in parts.get("denoiser", {}).items() if k not in ("loss", "weighting")}
    yield from _flat("module", parts)


def _flat(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(f"{name}.{key}", value)
    else:
        yield name, node


def load_model(path: Path | str) -> Diffusion:
    """The trained model of a checkpoint, rebuilt from the checkpoint's own config, with EMA weights where it has them.

    Raises:
        AntherError: the file is no checkpoint of a diffusion model, or its weights do not fit its config.
    """
    checkpoint = read(path)
    module = build(checkpoint["config"]["module"])
    if not isinstance(module, Diffusion):
        raise AntherError(f"{path} holds a {type(module).__name__}, which draws no images: use a diffusion checkpoint.")
    try:
        module.load_state_dict(checkpoint["state_dict"])
        if "ema" in checkpoint:
            module.denoiser.network.load_state_dict(checkpoint["ema"]["network"])
    except (RuntimeError, KeyError) as error:
        raise AntherError(f"the weights in {path} do not fit its own config: {' '.join(str(error).split())}") from error
    module.config = checkpoint["config"]
    return module.eval()
