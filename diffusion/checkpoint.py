"""Checkpoints: what one is, whether it fits, and the model inside."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffusion.build import build
from diffusion.errors import AntherError
from diffusion.modules.generator import Generator
from diffusion.networks.unet import UNet
from diffusion.networks.upstream import load_upstream, read_state


def read(path: Path | str) -> dict[str, Any]:
    """A checkpoint as the dict that was saved; nothing in it is executed, tensors stay on the CPU.

    Raises:
        AntherError: there is no such file, it is damaged, it holds more than plain data, or no config.
    """
    checkpoint = _content(path)
    if not _is_ours(checkpoint):
        raise AntherError(f"{path} was not written by train.py (it has no config inside): use a checkpoint of a run.")
    assert isinstance(checkpoint, dict)
    return checkpoint


def _content(path: Path | str) -> Any:
    path = Path(path)
    if not path.is_file():
        raise AntherError(
            f"there is no checkpoint at {path}: give ckpt= the path of a file such as checkpoints/last.ckpt."
        )
    try:
        # Only the archive format can be mapped; older files are read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises a dozen types here, all of them meaning the same to the user
        raise AntherError(
            f"{path} is not a whole checkpoint (truncated, of another kind, or with more than plain data in it): use "
            "another one."
        ) from error


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and "config" in content and "state_dict" in content


def check_fits(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path | str) -> None:
    """Refuses to go on with a checkpoint whose model is not the one that the config describes.

    Raises:
        AntherError: naming what differs.
    """
    if found := differences(_model(checkpoint["config"]), _model(config)):
        raise AntherError(
            f"{path} holds another model: {found}; give the same settings, or another hydra.run.dir or ckpt."
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Says where two nested records differ, naming four settings at most; empty where they do not.

    A setting that is absent is one that is None.
    """
    old, new = dict(_flat("", there)), dict(_flat("", here))
    different = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    shown = ", ".join(f"{key} = {_short(old.get(key))} there and {_short(new.get(key))} here" for key in different[:4])
    return shown + (f" and {len(different) - 4} more" if len(different) > 4 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make one model another."""
    module = config["module"]
    parts = {
        key: module[key] for key in ("_target_", "denoiser", "network", "conditioner", "augment_dim") if key in module
    }
    # These change what is learnt, not what the weights mean.
    parts["denoiser"] = {k: v for k, v in parts.get("denoiser", {}).items() if k not in ("loss", "weighting")}
    return {"module": parts}


def _flat(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(f"{name}.{key}" if name else str(key), value)
    else:
        yield name, node


def load_model(path: Path | str, config: Mapping[str, Any] | None = None) -> Generator:
    """The trained model of a file.

    Args:
        path: a checkpoint, from whose own config the model is rebuilt, with EMA weights where it has them; or the
            state dict of a network, from anywhere.
        config: for a state dict: the resolved config of a run, whose `module` is built. Weights of a `UNet` are read
            by the rules of `networks.upstream`; those of any other network must have its keys, and what has no
            parameters, such as an activation, is believed.

    Raises:
        AntherError: the file holds no weights of a model that draws, they do not fit the config, or a config is given
            for a checkpoint that has its own.
    """
    if config is None:
        checkpoint = read(path)
        module = _generator(checkpoint["config"], path)
        with _fitting(path, "its own config"):
            module.load_state_dict(checkpoint["state_dict"])
            if "ema" in checkpoint:
                module.trained.load_state_dict(checkpoint["ema"]["network"])
        return module
    state = _content(path)
    if _is_ours(state):
        raise AntherError(f"{path} has its own config, and the model inside may not be overridden: leave config out.")
    module = _generator(config, path)
    network = module.trained
    if isinstance(network, UNet):
        published = load_upstream(path, network.T, network.img_size)
        if published.family != network.family:
            raise AntherError(
                f"{path} holds a network of the family {published.family} and the config describes {network.family}: "
                f"set network.family={published.family}, or give the config that belongs to the file."
            )
        state = published.state_dict()
    else:
        state = read_state(path)[0]
    with _fitting(path, "the given config"):
        network.load_state_dict(state)
    return module


def _generator(config: Mapping[str, Any], path: Path | str) -> Generator:
    if "module" not in config:
        raise AntherError(f"the config for {path} describes no module: give the config of a run of train.py.")
    module = build(config["module"])
    if not isinstance(module, Generator):
        raise AntherError(
            f"{path} holds a {type(module).__name__}, which draws no images: use a checkpoint of a model that does."
        )
    module.config = dict(config)
    return module.eval()


@contextmanager
def _fitting(path: Path | str, config: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, KeyError, TypeError) as error:
        raise AntherError(f"the weights in {path} do not fit {config}: {' '.join(str(error).split())}") from error
