"""Averaged weights for validation and sampling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion.errors import AntherError
from diffusion.modules.generator import Generator


class EMA(Callback):
    """Exponential moving average of the network's weights, with warm-up.

    After optimizer step number n, counted from 0:

        average <- d_n average + (1 - d_n) weights,   d_n = min(decay, (1 + n) / (10 + n))

    so d_0 = 0.1, d_100 = 0.92, d_1000 = 0.991, d_10000 = 0.9991, and 0.9999 is reached at n = 89,990: until then the
    average spans about the last ninth of the run, whatever its length, and the first weights are forgotten at once.

    The average takes the place of the weights from `on_validation_start` to `on_validation_end`, and wherever
    `averaged` is used. Checkpoints hold the trained weights in `state_dict` and
    `ema = {"network": state dict, "updates": n}`, also when they are written during validation.

    Lightning's `WeightAveraging` is not the base: it averages the whole module, puts the average into the checkpoint's
    `state_dict`, and overwrites the trained weights at the end of the fit, so a finished run could not go on.

    Args:
        decay: the limit of d_n, in [0, 1).

    Reference: Polyak and Juditsky, 1992, doi:10.1137/0330046; for diffusion Ho et al., 2020, arXiv:2006.11239.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise AntherError(f"callbacks.ema.decay lies in [0, 1), not at {decay}.")
        self.decay = decay
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        self._steps_seen = 0
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Goes to the head of the callbacks, so that all others find the weights already in their place."""
        # A new list: Lightning is iterating over the old one.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts from the network's weights, unless a checkpoint brought an average."""
        live = _tensors(pl_module)
        if not self._average:
            self._average = {name: tensor.detach().clone() for name, tensor in live.items()}
        elif self._average.keys() != live.keys():
            raise AntherError(
                "the averaged weights in the checkpoint are those of another network; use its own config."
            )
        else:
            self._average = {name: self._average[name].to(tensor, copy=True) for name, tensor in live.items()}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self._steps_seen = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Updates the average if an optimizer step was taken: not after every batch under accumulation."""
        if trainer.global_step == self._steps_seen:
            return
        live = _tensors(pl_module)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        moving = [name for name, tensor in live.items() if tensor.is_floating_point()]
        update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        update([self._average[n] for n in moving], [live[n].detach() for n in moving], 1)
        for name in live.keys() - set(moving):
            self._average[name].copy_(live[name])
        self.updates += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average in."""
        if self._average and not self._swapped:
            self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the trained weights back."""
        if self._swapped:
            self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Puts the trained weights back when validation or a drawing broke off."""
        if self._swapped:
            self._swap(pl_module)

    @contextmanager
    def swapped(self, module: LightningModule) -> Iterator[None]:
        """The average in place of the trained weights, within a block; blocks may be nested."""
        if self._swapped or not self._average:
            yield
            return
        self._swap(module)
        try:
            yield
        finally:
            if self._swapped:
                self._swap(module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds `ema`, and sees to it that `state_dict` holds the trained weights."""
        inside = {name: tensor.detach() for name, tensor in _tensors(pl_module).items()}
        average, live = (inside, self._average) if self._swapped else (self._average, inside)
        checkpoint["ema"] = {"network": dict(average), "updates": self.updates}
        stem = next(name for name, part in pl_module.named_modules() if part is _network(pl_module))
        checkpoint["state_dict"].update({f"{stem}.{name}": tensor for name, tensor in live.items()})

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the average and its counter up again; a checkpoint without them starts from its weights."""
        if "ema" in checkpoint:
            self._average = checkpoint["ema"]["network"]
            self.updates = checkpoint["ema"]["updates"]

    def _swap(self, module: LightningModule) -> None:
        # Storages change hands and nothing is copied: exact, and no third set of weights in memory.
        for name, tensor in _tensors(module).items():
            tensor.data, self._average[name] = self._average[name], tensor.data
        self._swapped = not self._swapped


def _tensors(module: LightningModule) -> dict[str, Tensor]:
    """The network's parameters and saved buffers themselves, by the names of its state dict."""
    tensors: dict[str, Tensor] = _network(module).state_dict(keep_vars=True)
    return tensors


def _network(module: LightningModule) -> torch.nn.Module:
    assert isinstance(module, Generator)
    return module.trained


@contextmanager
def averaged(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The averaged weights within a block, if the trainer has an `EMA`; else the weights as they are."""
    ema = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)  # type: ignore[attr-defined]
    if ema is None:
        yield
        return
    with ema.swapped(module):
        yield
