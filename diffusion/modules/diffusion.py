"""LightningModules: unconditional and classifier-free diffusion. They own the network and the loss, nothing else."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from diffusion.conditioning.base import Conditioner
from diffusion.denoiser import Denoiser, Predictor
from diffusion.devices import upload
from diffusion.editing import Edit
from diffusion.errors import AntherError
from diffusion.guidance import AutoGuidance, ClassifierFree, Guidance
from diffusion.modules.epoch_mean import epoch_mean
from diffusion.modules.generator import Generator
from diffusion.modules.learning_rate import MakeScheduler
from diffusion.networks.layout import lay_out
from diffusion.rng import TRAINING, VALIDATION, ImageRNG, generator
from diffusion.samplers import Hook, Sampler

GOLDEN = (5**0.5 - 1) / 2


Spread = Literal["uniform", "stratified"]


def draw_times(n: int, T: int, spread: Spread, rng: torch.Generator) -> Tensor:
    """Training times on the grid k / T, k = 1..T.

    Args:
        n: batch size.
        T: steps of the schedule.
        spread: `uniform` draws each on its own; `stratified` draws one from each n-th part of [0, 1], which gives the
            same mean loss with less variance (Kingma et al., 2021, arXiv 2107.00630).
        rng: generator.

    Returns:
        (n,), float64, in [1 / T, 1].
    """
    u = torch.rand(n, generator=rng, dtype=torch.float64)
    if spread == "stratified":
        u = (torch.arange(n, dtype=torch.float64) + u) / n
    return ((u * T).floor() + 1).clamp(max=T) / T


class TrainingDraws(NamedTuple):
    """All that is random about n training samples.

    Attributes:
        t: (n,) float64 in [1 / T, 1].
        uniforms: (n,) in [0, 1): which conditions are dropped.
        eps: (n, *shape), standard normal.
    """

    t: Tensor
    uniforms: Tensor
    eps: Tensor


def draw_training(
    key: Sequence[int], total: int, places: Sequence[int], shape: Sequence[int], T: int, spread: Spread
) -> TrainingDraws:
    """Draws for some of the samples of a batch; the draws of a place do not depend on which others are asked for.

    Args:
        key: of the batch.
        total: samples of the whole batch.
        places: of the n samples in it, each below `total`.
        shape: of the noise of a sample.
        T: steps of the schedule.
        spread: see `draw_times`.
    """
    rng = generator(*key)
    # In a random order: what a process or an accumulated batch takes is then spread over all times as well.
    order = torch.randperm(total, generator=rng)[list(places)]
    t = draw_times(total, T, spread, rng)[order]
    uniforms = torch.rand(total, generator=rng)[list(places)]
    eps = torch.stack([torch.randn(tuple(shape), generator=generator(*key, place)) for place in places])
    return TrainingDraws(t, uniforms, eps)


class Diffusion(Generator):
    """Unconditional diffusion.

    Args:
        denoiser: what is trained.
        sampler: draws the images of `sample` unless another is given.
        optimizer: parameters -> optimizer.
        scheduler: (optimizer, total_steps) -> Lightning's `lr_scheduler` config; see `modules.learning_rate`.
        seed: of noise and times, in training and validation.
        times: how training times are spread over a batch, see `draw_times`.
        val_times: evaluations per validation image. Image i is always seen at the same times with the same noise of the
            seed, so the loss of two epochs, or of two runs with one seed, may be compared; another seed draws other
            noise, which alone moves the loss of the same weights.
        augment_dim: width of the labels of a non-leaking augmentation, appended to the condition; zeros in sampling.
    """

    sampler: Sampler
    guidance = Guidance()

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: MakeScheduler | None = None,
        seed: int = 0,
        times: Spread = "stratified",
        val_times: int = 4,
        augment_dim: int = 0,
    ) -> None:
        super().__init__(optimizer, scheduler, seed)
        if val_times < 1:
            raise AntherError(f"module.val_times = {val_times} counts evaluations of an image: give 1 or more.")
        if augment_dim < 0:
            raise AntherError(f"module.augment_dim = {augment_dim} counts labels: give 0 or more.")
        self.denoiser = denoiser
        self.sampler = sampler
        self.times = times
        self.val_times = val_times
        self.augment_dim = augment_dim
        self.val_loss = epoch_mean()
        self.last_losses: dict[str, Tensor] = {}  # of the last batch: t (B,) and loss (B,), for callbacks

    # What the batch is conditioned on -------------------------------------------------------------------------------

    def training_condition(self, batch: Mapping[str, Tensor], uniforms: Tensor) -> Tensor | None:
        """Conditions of a training batch, (B, D), or None; uniforms (B,) in [0, 1) decide what is dropped."""
        return self.augmentation(batch) if self.augment_dim else None

    def validation_condition(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Conditions of a validation batch, (B, D), or None; nothing is dropped."""
        return self.augmentation(batch) if self.augment_dim else None

    def augmentation(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Labels of the augmentation, (B, augment_dim); zeros where the batch has none."""
        image = batch["image"]
        return batch.get("augment", image.new_zeros(len(image), self.augment_dim))

    # Training -------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Holds the data against the network before the first hour is spent."""
        datamodule = getattr(self.trainer, "datamodule", None)
        network: Any = self.denoiser.network
        if datamodule is None or not hasattr(network, "img_ch"):
            return
        channels, height, _ = datamodule.image_shape
        if (channels, height) != (network.img_ch, network.img_size):
            raise AntherError(
                f"the data are {channels} x {height} x {height} and the network takes {network.img_ch} x "
                f"{network.img_size} x {network.img_size}: choose data and network that fit each other."
            )
        told = getattr(getattr(datamodule, "augment", None), "width", 0)
        if told and told != self.augment_dim:
            width = told if self.conditioner is None else network.c_embed_dim - self.augment_dim + told
            raise AntherError(
                f"the augmentation tells the network {told} numbers of each image, and module.augment_dim is "
                f"{self.augment_dim}: set module.augment_dim={told} network.c_embed_dim={width}."
            )
        if self.conditioner is None and self.augment_dim and self.augment_dim != network.c_embed_dim:
            raise AntherError(
                f"the network takes conditions of width {network.c_embed_dim}, and the augmentation gives "
                f"{self.augment_dim}: set network.c_embed_dim={self.augment_dim}."
            )

    def configure_model(self) -> None:
        """Lays the weights out for the device and precision of the trainer."""
        lay_out(self.denoiser.network, self.trainer.strategy.root_device, self.trainer.precision)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Mean loss of the batch.

        Noise, times and what is dropped are a function of (seed, step, place), where a sample's place is that in the
        batch of the optimizer's step. The same batch on other numbers of devices, or gathered over several
        accumulated batches, trains the same network, unless its layers draw too: see `Module`.
        """
        x_0 = batch["image"]
        draws = self._draws(len(x_0), batch_idx, x_0.shape[1:])
        condition = self.training_condition(batch, draws.uniforms)
        losses = self.denoiser.loss(x_0, draws.t, upload(draws.eps, x_0.device, x_0.dtype), condition)
        self.last_losses = {"t": upload(draws.t, x_0.device), "loss": losses.detach()}
        loss = losses.mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=len(x_0), sync_dist=True)
        return loss

    def _draws(self, n: int, batch_idx: int, shape: Sequence[int]) -> TrainingDraws:
        """The draws of this process's n samples of a batch."""
        total, places = self.places(n, batch_idx)
        return draw_training(
            (TRAINING, self.seed, self.trainer.global_step),
            total,
            places,
            shape,
            self.denoiser.schedule.T,
            self.times,
        )

    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Loss over a fixed grid of (t, noise)."""
        t, losses = self.validation_losses(batch)
        self.last_losses = {"t": t, "loss": losses}
        self.val_loss.update(losses)
        self.log("val/loss", self.val_loss, prog_bar=True)

    def validation_losses(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Times and losses of a batch of B images, each at its own K times with its own noise: two tensors (K B,)."""
        x_0, cond = batch["image"], self.validation_condition(batch)
        t, eps = self._validation_grid(batch["index"], x_0.shape[1:])
        losses = [
            self.denoiser.loss(x_0, t_k, upload(eps_k, x_0.device, x_0.dtype), cond)
            for t_k, eps_k in zip(t, eps, strict=True)
        ]
        return upload(t.flatten(), x_0.device), torch.cat(losses)

    def _validation_grid(self, index: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Times (K, B) and noise (K, B, C, H, W) of the images with these row numbers; the seed decides the noise."""
        T, k = self.denoiser.schedule.T, self.val_times
        # Each image takes K evenly spaced times; the offset walks by the golden ratio, so all images fill the gaps.
        index = index.cpu()  # once: the device is waited for
        offset = (index.double() * GOLDEN) % 1
        u = (torch.arange(k, dtype=torch.float64)[:, None] + offset) / k
        rngs = [generator(VALIDATION, self.seed, int(i)) for i in index]
        eps = torch.stack([torch.randn(k, *shape, generator=rng) for rng in rngs], 1)
        return ((u * T).floor() + 1).clamp(max=T) / T, eps

    def describe(self) -> dict[str, str]:
        """What a person wants to know before the run, by heading."""
        network, denoiser = self.denoiser.network, self.denoiser
        count = sum(p.numel() for p in network.parameters())
        low, high = denoiser.schedule.snr(torch.tensor([1.0, 1 / denoiser.schedule.T], dtype=torch.float64)).tolist()
        return {
            "network": f"{type(network).__name__}, {count:,} parameters",
            "schedule": f"{type(denoiser.schedule).__name__}, T = {denoiser.schedule.T}, SNR {high:.3g} to {low:.3g}",
            "predicts": denoiser.target,
            "condition": "none",
        }

    # Sampling -------------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> nn.Module:  # noqa: D102
        return self.denoiser.network

    @property
    def T(self) -> int:  # noqa: D102, N802
        return self.denoiser.schedule.T

    @property
    def image_shape(self) -> tuple[int, int, int]:  # noqa: D102
        network: Any = self.denoiser.network
        return network.img_ch, network.img_size, network.img_size

    def predictor(self, weight: float | Tensor | None, guidance: Guidance | None = None) -> Predictor:
        """What the sampler is given.

        Args:
            weight: guidance weight w; None takes the module's own.
            guidance: the rest of it; None takes the module's own.

        Raises:
            AntherError: guidance of a model that has neither a condition nor a worse model to be led away from, or one
                by a worse model that leaves the weight open.
        """
        guidance = guidance or self.guidance
        if guidance.bad is not None and weight is not None:
            return AutoGuidance(self.denoiser, guidance.bad, weight, guidance)
        if guidance.bad is not None:
            raise AntherError("this model has no guidance weight of its own: set guidance.weight beside guidance.bad.")
        if weight is not None:
            raise AntherError("this model has no condition, so guidance.weight does not apply: leave it out.")
        if guidance != Guidance():
            raise AntherError(
                "this model has no condition, so guidance.interval, guidance.rescale and guidance.negative do not "
                "apply: leave them out."
            )
        return self.denoiser

    def sampling_condition(self, prompts: Sequence[str] | None, n: int) -> Tensor | None:
        """Conditions for n images, (n, D), or None.

        Raises:
            AntherError: prompts for a model that has no condition.
        """
        if prompts is not None:
            raise AntherError("this model was trained without a condition and takes no prompts: leave them out.")
        return torch.zeros(n, self.augment_dim) if self.augment_dim else None

    def check_request(  # noqa: D102
        self, prompts: Sequence[str] | None, n: int, weight: float | None = None, guidance: Guidance | None = None
    ) -> None:
        self.predictor(weight, guidance)
        self.sampling_condition(prompts, n)

    @torch.no_grad()
    def look_at(self, images: Tensor, prompts: Sequence[str] | None) -> None:
        """See `Generator`; the least time the network knows is t = 1 / T."""
        cond = self.sampling_condition(prompts, len(images))
        t = torch.full((len(images),), 1 / self.T, dtype=torch.float64)
        self.denoiser(images, t, None if cond is None else upload(cond, images.device))

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
        rng = ImageRNG(seeds)
        cond = self.sampling_condition(prompts, len(seeds))
        cond = None if cond is None else upload(cond, self.device)
        noise = rng.randn(self.image_shape, self.device)
        x, start, project = (noise, 1.0, None) if edit is None else edit.begin(self.denoiser.schedule, noise)
        was_training = self.training
        self.eval()
        try:
            predictor = self.predictor(weight, guidance)
            images = (sampler or self.sampler)(predictor, x, rng, cond, hook, start, project)
        finally:
            self.train(was_training)
        return images


class ClassifierFreeDiffusion(Diffusion):
    """Conditional diffusion whose condition is dropped at random, so that it can be guided.

    Args:
        denoiser: as in `Diffusion`; the network takes conditions of width `conditioner.dim + augment_dim`.
        sampler: as in `Diffusion`.
        optimizer: as in `Diffusion`.
        conditioner: batch or prompts -> conditions; owns the null condition.
        drop_prob: probability with which a sample's whole condition is replaced by the null.
        weight: guidance weight w of `sample`: e = (1 + w) e_c - w e_u.
        interval: noise levels sigma / alpha at which guidance acts, see `Guidance`; None is all of them.
        rescale: share by which guided images are brought back to the deviation of unguided ones, see `Guidance`.
        **options: of `Diffusion`.

    Raises:
        AntherError: the conditioner's width is not the network's.
    """

    conditioner: Conditioner
    weight: float

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        conditioner: Conditioner,
        drop_prob: float = 0.1,
        weight: float = 1.0,
        interval: Sequence[Any] | None = None,  # of numbers, and inf is one: `Guidance` looks
        rescale: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(denoiser, sampler, optimizer, **options)
        width = getattr(denoiser.network, "c_embed_dim", None)
        if width is not None and width != conditioner.dim + self.augment_dim:
            extra = f" and the augmentation {self.augment_dim}" if self.augment_dim else ""
            raise AntherError(
                f"the network takes conditions of width {width}, the conditioner gives {conditioner.dim}{extra}: set "
                f"network.c_embed_dim={conditioner.dim + self.augment_dim} or choose another conditioner."
            )
        if not 0 <= drop_prob <= 1:
            raise AntherError(f"module.drop_prob is a probability, not {drop_prob}: choose it in [0, 1].")
        self.conditioner = conditioner
        self.drop_prob = drop_prob
        self.weight = weight
        self.guidance = Guidance(interval, rescale)

    def setup(self, stage: str) -> None:  # noqa: D102
        super().setup(stage)
        if stage == "fit":
            datamodule: Any = getattr(self.trainer, "datamodule", None)
            self.conditioner.device = self.trainer.strategy.root_device
            self.conditioner.prepare(datamodule.table)

    def describe(self) -> dict[str, str]:  # noqa: D102
        guided = f"guidance weight w = {self.weight}{self.guidance.describe()}"
        dropped = f"dropped for {self.drop_prob:.0%} of the samples"
        return {**super().describe(), "condition": f"{self.conditioner.describe()}; {dropped}, {guided}"}

    def training_condition(self, batch: Mapping[str, Tensor], uniforms: Tensor) -> Tensor:  # noqa: D102
        cond = self.conditioner.drop(self.conditioner.lookup(batch), self.drop_prob, uniforms)
        return torch.cat([cond, self.augmentation(batch)], 1)

    def validation_condition(self, batch: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return torch.cat([self.conditioner.lookup(batch), self.augmentation(batch)], 1)

    def predictor(  # noqa: D102
        self, weight: float | Tensor | None, guidance: Guidance | None = None
    ) -> Predictor:
        weight, guidance = self.weight if weight is None else weight, guidance or self.guidance
        if guidance.bad is not None:
            return AutoGuidance(self.denoiser, guidance.bad, weight, guidance)
        if guidance.negative is not None:
            return ClassifierFree(self.denoiser, self.sampling_condition([guidance.negative], 1)[0], weight, guidance)
        null = torch.cat([self.conditioner.null, torch.zeros(self.augment_dim)])
        return ClassifierFree(self.denoiser, null, weight, guidance)

    def sampling_condition(self, prompts: Sequence[str] | None, n: int) -> Tensor:  # noqa: D102
        if prompts is None or len(prompts) != n:
            given = "none" if prompts is None else str(len(prompts))
            raise AntherError(
                f"{n} images need {n} prompts and {given} were given: name them, as in prompts='[a red rose]'."
            )
        self.conditioner.device = self.device
        cond = self.conditioner.encode(prompts)
        return torch.cat([cond, cond.new_zeros(n, self.augment_dim)], 1)
