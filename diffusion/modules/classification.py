"""The LightningModule that trains a classifier."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from diffusion.errors import AntherError
from diffusion.modules.base import Module
from diffusion.modules.epoch_mean import epoch_mean
from diffusion.modules.learning_rate import MakeScheduler
from diffusion.networks.classifier import LeNet

Loss = Literal["cross_entropy", "focal"]


def focal_loss(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Cross-entropy that looks away from what is known already: -(1 - p)^γ log p, with p that of the label.

    Args:
        logits: (B, K).
        labels: int64 (B,).
        gamma: 0 or more; 0 is the cross-entropy.

    Returns:
        One value per sample, (B,).

    Reference: Lin et al., 2017, arXiv:1708.02002.
    """
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** gamma) * log_p


class Classification(Module):
    """A classifier of the data module's images.

    Logs `train/loss`, `val/loss` and `val/accuracy`.

    Args:
        network: what is trained.
        optimizer: parameters -> optimizer.
        scheduler: (optimizer, total_steps) -> Lightning's `lr_scheduler` config; see `modules.learning_rate`.
        seed: of dropout's masks.
        loss: cross_entropy, or focal, which weighs samples down that are classified well already.
        gamma: how strongly focal does so.
    """

    def __init__(
        self,
        network: LeNet,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: MakeScheduler | None = None,
        seed: int = 0,
        loss: Loss = "cross_entropy",
        gamma: float = 2.0,
    ) -> None:
        super().__init__(seed)
        if loss not in ("cross_entropy", "focal"):
            raise AntherError(f"module.loss is cross_entropy or focal, not {loss!r}.")
        if gamma < 0:
            raise AntherError(f"module.gamma={gamma} must be 0 or more.")
        self.network = network
        self.loss, self.gamma = loss, gamma
        # The resolved config of the run; the entry point sets it, checkpoints carry it.
        self.config: dict[str, Any] = {}
        self.val_loss, self.val_accuracy = epoch_mean(), epoch_mean()
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler

    def describe(self) -> dict[str, str]:
        """What a person wants to know before the run, by heading."""
        count = sum(p.numel() for p in self.network.parameters())
        loss = self.loss if self.loss == "cross_entropy" else f"focal, gamma {self.gamma}"
        return {
            "network": f"{type(self.network).__name__}, {count:,} parameters, {self.network.classes} classes",
            "loss": loss,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The resolved config travels with the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["config"] = self.config

    def setup(self, stage: str) -> None:
        """Holds the data against the network.

        Raises:
            AntherError: other images or classes than the network's.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        ours, theirs = (self.network.image_shape, self.network.classes), (data.image_shape, len(data.class_names))
        if ours != theirs:
            raise AntherError(
                f"the data are {theirs[1]} classes of images {theirs[0]} and the network has {ours[1]} of {ours[0]}: "
                "choose data and network that fit each other (data=mnist has 10 classes, data=mnist_idk 11)."
            )

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """One value per sample, (B,)."""
        if self.loss == "focal":
            return focal_loss(logits, labels, self.gamma)
        return cross_entropy(logits, labels, reduction="none")

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        labels = batch["label"]
        loss = self.losses(self.network(batch["image"]), labels).mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(labels), sync_dist=True)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a batch."""
        labels = batch["label"]
        logits = self.network(batch["image"])
        self.val_loss.update(self.losses(logits, labels))
        self.val_accuracy.update((logits.argmax(1) == labels).float())
        self.log_dict({"val/loss": self.val_loss, "val/accuracy": self.val_accuracy}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        """What the config chose."""
        optimizer = self._make_optimizer(self.network.parameters())
        if self._make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self._make_scheduler(optimizer, self.total_steps)}
