"""Checkpoints that are whole or absent."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from diffusion.errors import AntherError
from diffusion.files import atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a killed save leaves the previous checkpoint as it was.

    Lightning's own writer goes through a file in the system's temporary folder and moves it, which across file systems
    is a copy: a kill in its middle leaves half a `last.ckpt`. It also holds the whole checkpoint in memory once more.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Saves a checkpoint.

        Raises:
            AntherError: no space, or a folder that cannot be written.
        """
        with atomic(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:
                # The archive writer says where in the file it stopped, not why.
                raise AntherError(
                    f"cannot write {path} whole: free some space or choose another hydra.run.dir; the checkpoint that "
                    "lay there is kept."
                ) from error
            # On the disk before it takes the name of the one before it, also when the machine loses its power.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
