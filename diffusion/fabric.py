"""Devices for work that is not training: the trainer's settings, without the trainer."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from lightning import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from diffusion.errors import AntherError

T = TypeVar("T")

# The rest of the trainer group speaks of training alone.
_USED = ("accelerator", "devices", "num_nodes", "strategy", "precision")


def make_fabric(trainer: Mapping[str, Any], **instead: Any) -> Fabric:
    """Lightning's Fabric on the devices and in the precision of a `trainer` config, not launched yet.

    Args:
        trainer: config of the trainer; accelerator, devices, num_nodes, strategy and precision are used.
        **instead: settings that replace those of the config.

    Raises:
        AntherError: this machine does not have what the config asks for, or see `set_precision`.
    """
    settings = {key: trainer[key] for key in _USED if key in trainer} | instead
    if isinstance(settings.get("strategy"), Mapping):
        settings["strategy"] = "ddp"  # its options are about gradients
    try:
        fabric = Fabric(**settings)
    except (ImportError, RuntimeError, ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise AntherError(
            f"trainer.accelerator={settings.get('accelerator')} with trainer.devices={settings.get('devices')}, "
            f"strategy {settings.get('strategy')} and precision {settings.get('precision')} does not run here "
            f"({reason}): set trainer=cpu, or what this machine has."
        ) from error
    set_precision(fabric._precision.precision)
    return fabric


def set_precision(precision: str) -> None:
    """Refuses weights that are not float32, as the noise and the solvers are, and has float32 be that on a GPU.

    cuDNN convolves float32 in TF32 unless told otherwise, with 10 bits in the place of 23, and images and scores would
    be others than a CPU's. Who wants speed trains and draws in bf16-mixed, which leaves the scores in float32.

    Args:
        precision: Lightning's name of it.

    Raises:
        AntherError: it is one of those.
    """
    if precision.endswith("-true") and precision != "32-true":
        raise AntherError(
            f"trainer.precision={precision} gives the network other weights than float32, in which images are drawn: "
            "set trainer.precision=bf16-mixed, which computes in bfloat16 around them, or 32-true."
        )
    torch.backends.cudnn.allow_tf32 = False


def on_rank_zero(fabric: Fabric, work: Callable[[], T]) -> T | None:
    """Lets rank 0 do something while the others wait, and its fault be one of all: nobody waits for a rank that left.

    Args:
        fabric: launched.
        work: what rank 0 does.

    Returns:
        Its result on rank 0, None on the others.

    Raises:
        AntherError: on every rank; what else rank 0 raises stays its own there.
    """
    result, fault = None, None
    if fabric.is_global_zero:
        try:
            result = work()
        except Exception as error:
            fault = error
    said = fabric.broadcast(None if fault is None else str(fault))
    if fault is not None:
        raise fault
    if said is not None:
        raise AntherError(f"rank 0: {said}")
    return result
