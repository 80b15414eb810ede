"""Devices for work that is not training: the trainer's settings, without the trainer."""

from collections.abc import Mapping
from typing import Any

from lightning import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException

from diffusion.errors import AntherError

# The rest of the trainer group speaks of training alone.
_USED = ("accelerator", "devices", "num_nodes", "strategy", "precision")


def make_fabric(trainer: Mapping[str, Any], **instead: Any) -> Fabric:
    """Lightning's Fabric on the devices and in the precision of a `trainer` config, not launched yet.

    Args:
        trainer: config of the trainer; accelerator, devices, num_nodes, strategy and precision are used.
        **instead: settings that replace those of the config.

    Raises:
        AntherError: this machine does not have what the config asks for.
    """
    settings = {key: trainer[key] for key in _USED if key in trainer} | instead
    try:
        return Fabric(**settings)
    except (ImportError, RuntimeError, ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise AntherError(
            f"trainer.accelerator={settings.get('accelerator')} with trainer.devices={settings.get('devices')}, "
            f"strategy {settings.get('strategy')} and precision {settings.get('precision')} does not run here "
            f"({reason}): set trainer=cpu, or what this machine has."
        ) from error
