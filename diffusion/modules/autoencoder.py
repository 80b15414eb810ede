"""The LightningModule that trains variational autoencoders, and draws from them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim import Optimizer

from diffusion.devices import upload
from diffusion.editing import Edit
from diffusion.errors import AntherError
from diffusion.guidance import Guidance
from diffusion.modules.epoch_mean import epoch_mean
from diffusion.modules.generator import Generator
from diffusion.modules.learning_rate import MakeScheduler
from diffusion.networks.autoencoders import VAE, Autoencoder
from diffusion.rng import TRAINING, VALIDATION, ImageRNG, generator
from diffusion.samplers import Hook, Sampler

Loss = Literal["bce", "mse", "l1"]


class VariationalAutoencoder(Generator):
    """Trains an autoencoder by its evidence bound, and draws by decoding z from N(0, 1).

    The loss of an image is a sum over its pixels, in nats where it is a likelihood:

        loss = reconstruction + kl_weight KL(q(z | x) || N(0, 1))

    with z = mean + sigma eps drawn once. `bce` reads pixels in [0, 1] as probabilities, which makes the loss the
    negative evidence bound of seed 004 (Kingma and Welling, 2014, arXiv 1312.6114); `mse` is half the squared distance,
    the likelihood of unit Gaussians up to a constant; `l1` the absolute one. With a small `kl_weight` reconstructions
    are sharp and latents far from N(0, 1): an autoencoder for latent diffusion, whose own draws mean little.

    Logs `train/loss`, `val/loss`, and of both their parts `reconstruction` and `kl`, all per image.

    Args:
        network: the autoencoder.
        optimizer: parameters -> optimizer.
        scheduler: (optimizer, total_steps) -> Lightning's `lr_scheduler` config; see `modules.learning_rate`.
        seed: of the draws of z, in training and validation.
        loss: bce, mse or l1; bce needs a network with `logits`.
        kl_weight: weight of the KL.

    Attributes:
        latent_scale: 1 / deviation of the latents' means over the validation images, a saved buffer; 1 before the first
            validation. `to_latents` multiplies by it, so that diffusion meets unit variance (Rombach et al., 2022,
            arXiv 2112.10752, section D.1).

    Raises:
        AntherError: an unknown loss, one that the network cannot give, or a negative weight.
    """

    latent_scale: Tensor

    def __init__(
        self,
        network: Autoencoder,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: MakeScheduler | None = None,
        seed: int = 0,
        loss: Loss = "bce",
        kl_weight: float = 1.0,
    ) -> None:
        super().__init__(optimizer, scheduler, seed)
        if loss not in get_args(Loss):
            raise AntherError(f"module.loss is {', '.join(get_args(Loss)[:-1])} or l1, not {loss!r}.")
        if loss == "bce" and not isinstance(network, VAE):
            raise AntherError(
                f"module.loss=bce reads pixels as probabilities, which {type(network).__name__} does not give: set "
                "module.loss to mse or l1."
            )
        if kl_weight < 0:
            raise AntherError(f"module.kl_weight = {kl_weight} must be 0 or more.")
        self.network = network
        self.loss, self.kl_weight = loss, kl_weight
        self.register_buffer("latent_scale", torch.ones(()))
        # Count, sum and sum of squares of the latents' means in this validation.
        self._moments: Tensor | None = None
        self.val_loss, self.val_reconstruction, self.val_kl = epoch_mean(), epoch_mean(), epoch_mean()

    @property
    def trained(self) -> Autoencoder:  # noqa: D102
        return self.network

    @property
    def image_shape(self) -> tuple[int, int, int]:  # noqa: D102
        return self.network.image_shape

    def describe(self) -> dict[str, str]:  # noqa: D102
        network = self.network
        count = sum(p.numel() for p in network.parameters())
        numbers = torch.Size(network.latent_shape).numel()
        pixels = torch.Size(network.image_shape).numel()
        return {
            "network": f"{type(network).__name__}, {count:,} parameters",
            "latent": f"{' x '.join(map(str, network.latent_shape))}, a number for {pixels / numbers:.3g} of the image",
            "loss": f"{self.loss} + {self.kl_weight:g} KL, summed over an image",
        }

    # Training -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Holds the data against the network before the first hour is spent."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is not None and tuple(datamodule.image_shape) != self.image_shape:
            theirs, ours = (" x ".join(map(str, shape)) for shape in (datamodule.image_shape, self.image_shape))
            raise AntherError(
                f"the data are {theirs} and the network takes {ours}: choose data and network that fit each other."
            )

    def losses(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction and KL of images with noise (B, *latent_shape), one value each per image, float32 (B,).

        Returns:
            Reconstruction, KL, and the latents' means (B, *latent_shape).
        """
        posterior = self.network.encode(images)
        posterior = type(posterior)(posterior.mean.float(), posterior.logvar.float())
        z, x = posterior.at(eps), images.float()
        match self.loss:
            case "bce":
                assert isinstance(self.network, VAE)
                logits = self.network.logits(z).float()
                distance = binary_cross_entropy_with_logits(logits, (x + 1) / 2, reduction="none")
            case "mse":
                distance = 0.5 * (self.network.decode(z).float() - x).square()
            case "l1":
                distance = (self.network.decode(z).float() - x).abs()
        return distance.flatten(1).sum(1), posterior.kl(), posterior.mean

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the batch; z is drawn by (seed, step, place), see `Generator.places`."""
        images = batch["image"]
        key = (TRAINING, self.seed, self.trainer.global_step)
        _, places = self.places(len(images), batch_idx)
        reconstruction, kl, _ = self.losses(images, self._noise([(*key, place) for place in places]))
        loss = (reconstruction + self.kl_weight * kl).mean()
        shared: dict[str, Any] = {"batch_size": len(images), "sync_dist": True, "on_epoch": True}
        self.log("train/loss", loss, on_step=True, prog_bar=True, **shared)
        parts = {"train/reconstruction": reconstruction.mean(), "train/kl": kl.mean()}
        self.log_dict(parts, on_step=False, **shared)
        return loss

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss with the same noise for the same image in every epoch."""
        eps = self._noise([(VALIDATION, self.seed, index) for index in batch["index"].tolist()])
        reconstruction, kl, means = self.losses(batch["image"], eps)
        self.val_loss.update(reconstruction + self.kl_weight * kl)
        self.val_reconstruction.update(reconstruction)
        self.val_kl.update(kl)
        self.log("val/loss", self.val_loss, prog_bar=True)
        self.log_dict({"val/reconstruction": self.val_reconstruction, "val/kl": self.val_kl})
        means = means.double()
        found = torch.stack([means.new_tensor(means.numel()), means.sum(), means.square().sum()])
        self._moments = found if self._moments is None else self._moments + found

    def on_validation_epoch_end(self) -> None:
        """Measures the scale of the latents."""
        moments, self._moments = self._moments, None
        if moments is None:
            return
        total = self.trainer.strategy.reduce(moments, reduce_op="sum")
        assert isinstance(total, Tensor)
        count, first, second = total
        self.latent_scale.copy_((second / count - (first / count) ** 2).rsqrt())

    def _noise(self, keys: Sequence[Sequence[int]]) -> Tensor:
        draws = [torch.randn(self.network.latent_shape, generator=generator(*key)) for key in keys]
        return upload(torch.stack(draws), self.device)

    # Latents --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Means of q(z | x) at unit variance, (B, *latent_shape), of images (B, C, H, W) in [-1, 1]."""
        return self.network.encode(images).mean * self.latent_scale

    @torch.no_grad()
    def from_latents(self, latents: Tensor) -> Tensor:
        """Images, nominally in [-1, 1], of what `to_latents` gives."""
        return self.network.decode(latents / self.latent_scale)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) as they come back through the means of q(z | x)."""
        return self.network.decode(self.network.encode(images).mean)

    # Sampling -------------------------------------------------------------------------------------------------------

    def check_request(  # noqa: D102
        self, prompts: Sequence[str] | None, n: int, weight: float | None = None, guidance: Guidance | None = None
    ) -> None:
        if prompts is not None or weight is not None or guidance not in (None, Guidance()):
            raise AntherError("an autoencoder has no condition, so prompts and guidance do not apply: leave them out.")

    @torch.no_grad()
    def sample(  # noqa: D102
        self,
        prompts: Sequence[str] | None,
        seeds: Sequence[int],
        weight: float | Tensor | None = None,
        sampler: Sampler | None = None,
        hook: Hook | None = None,
        guidance: Guidance | None = None,
        edit: Edit | None = None,
    ) -> Tensor:
        self.check_request(prompts, len(seeds), None if weight is None else 0.0, guidance)
        if sampler is not None or hook is not None or edit is not None:
            raise AntherError(
                "an autoencoder draws in one call: it takes no sampler and no image to draw anew, and there is no way "
                "to show."
            )
        return self.network.decode(ImageRNG(seeds).randn(self.network.latent_shape, self.device))

    @torch.no_grad()
    def look_at(self, images: Tensor, prompts: Sequence[str] | None) -> None:
        """See `Generator`; the encoder sees the images, the decoder what it makes of them."""
        self.reconstruct(images)
