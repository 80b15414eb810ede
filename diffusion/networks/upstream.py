"""Weights that were published for the two U-Net families, read into `UNet`."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.networks.unet import UNet

NESTED = ("state_dict", "model_state_dict")
PREFIXES = ("_orig_mod.", "module.")  # left by torch.compile and by DataParallel


def load_upstream(source: Path | str | Mapping[str, Any], T: int | None = None, img_size: int | None = None) -> UNet:
    """The published network that a state dict belongs to, with its weights.

    The family is recognised by its middle, and every size is taken from shapes. Two numbers are not in them: T, and for
    `handson` the image size, since that network is fully convolutional.

    Args:
        source: a file written by `torch.save`, or its content: a state dict, alone or under `state_dict` or
            `model_state_dict`. A leading `_orig_mod.` or `module.` is stripped from its keys.
        T: number of steps that the weights were trained with.
        img_size: image height and width; may be left out for the course's family.

    Returns:
        The network in evaluation mode, float32, on the CPU.

    Raises:
        AntherError: the file cannot be read, belongs to neither family, needs T or img_size, or holds missing or
            unexpected keys or wrong shapes, each of which is named.
    """
    state, where = read_state(source)
    family, attention = _family(state, where)
    # On the meta device: no time and no random numbers go into weights that are replaced at once.
    with torch.device("meta"):
        any_size = UNet(T=1, img_ch=1, img_size=4, down_chs=(32, 32, 32), family=family, self_attention=attention)
    _check_names(state, any_size.state_dict(), where)
    sizes = _sizes(state, family, where)
    if T is None:
        raise AntherError(f"{where} does not say how many steps it was trained with: pass T, 400 or 300 as published.")
    if family == "handson" and img_size is None:
        raise AntherError(f"{where} does not say for which image size: pass img_size, 32 or 28 as published.")
    if img_size is not None and sizes.get("img_size", img_size) != img_size:
        raise AntherError(
            f"{where} is for images of {sizes['img_size']} pixels and img_size = {img_size} was asked for: leave "
            "img_size out."
        )
    with torch.device("meta"):
        network = UNet(**{"img_size": img_size, **sizes}, T=T, family=family, self_attention=attention)
    _check_shapes(state, network.state_dict(), where)
    copies = {key: value.detach().to("cpu", torch.float32, copy=True) for key, value in state.items()}
    network.load_state_dict(copies, assign=True)
    return network.eval()


def read_state(source: Path | str | Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """The state dict of a network, of any kind, and what to call its source in messages.

    Args:
        source: see `load_upstream`.

    Raises:
        AntherError: the file cannot be read, or holds no state dict.
    """
    if isinstance(source, Mapping):
        content, where = source, "the state dict"
    else:
        where = str(source)
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except OSError as error:
            raise AntherError(f"cannot read {where}: {error.strerror}; give the path of a state dict.") from error
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise AntherError(
                f"{where} is no file of plain weights: save it again with torch.save(model.state_dict(), path)."
            ) from error
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise AntherError(f"{where} holds no state dict: give one, alone or under {' or '.join(NESTED)}.")
    return {_strip(key): value for key, value in content.items()}, where


def _strip(key: str) -> str:
    for prefix in PREFIXES * 2:
        key = key.removeprefix(prefix)
    return key


def _family(state: Mapping[str, Tensor], where: str) -> tuple[Literal["course", "handson"], bool]:
    """The family, and whether it has attention in the middle."""
    if any(key.startswith("dense_emb.") for key in state):
        return "course", False
    if any(key.startswith("mid_block.") for key in state):
        return "handson", any(key.startswith("mid_block.1.") for key in state)
    raise AntherError(
        f"{where} belongs to neither published U-Net: it has no dense_emb.* (course) and no mid_block.* (handson), and "
        f"begins with {', '.join(list(state)[:3]) or 'nothing'}."
    )


def _check_names(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    faults = [f"{name}: {', '.join(keys)}" for name, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    if faults:
        raise AntherError(
            f"{where} does not hold the keys of the published U-Net ({'; '.join(faults)}): give the unchanged file."
        )


def _check_shapes(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    faults = [
        f"{key} is {tuple(state[key].shape)} and should be {tuple(value.shape)}"
        for key, value in wanted.items()
        if state[key].shape != value.shape
    ]
    if faults:
        raise AntherError(f"{where} has shapes that do not fit together: {', '.join(faults)}; give the unchanged file.")


def _sizes(state: Mapping[str, Tensor], family: str, where: str) -> dict[str, Any]:
    """What shapes tell: constructor arguments of `UNet`."""
    measured = {
        "down0.conv1.model.0.weight": 4,
        "down1.model.0.model.0.weight": 4,
        "down2.model.0.model.0.weight": 4,
        "t_emb1.model.0.weight": 2,
        "c_embed1.model.0.weight": 2,
    }
    if family == "course":
        measured["dense_emb.0.weight"] = 2
    odd = [f"{key} is {tuple(state[key].shape)}" for key, dims in measured.items() if state[key].ndim != dims]
    if odd:
        raise AntherError(f"{where} has shapes that no U-Net has: {', '.join(odd)}; give the unchanged file.")
    down0, down1, down2, time, cond = (state[key].shape for key in list(measured)[:5])
    sizes: dict[str, Any] = {
        "img_ch": down0[1],
        "down_chs": (down0[0], down1[0], down2[0]),
        "t_embed_dim": time[1],
        "c_embed_dim": cond[1],
    }
    if family == "course":
        width = state["dense_emb.0.weight"].shape[1]
        latent = round((width / down2[0]) ** 0.5)
        if latent**2 * down2[0] != width:
            raise AntherError(
                f"{where} has shapes that do not fit together: dense_emb.0.weight takes {width} numbers, no square map "
                f"of {down2[0]} channels; give the unchanged file."
            )
        sizes["img_size"] = 4 * latent
    return sizes
