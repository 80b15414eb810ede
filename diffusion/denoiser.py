"""The one thing that crosses a border: denoiser(x_t, t, cond) -> x_0."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.devices import upload
from diffusion.errors import AntherError
from diffusion.schedules import Schedule
from diffusion.targets import TARGETS, Target, from_x_0, to_x_0
from diffusion.weighting import Weighting, unit

Loss = Literal["mse", "l1", "huber"]


class Predictor(Protocol):
    """What samplers see: E[x_0 | x_t], and the schedule it was trained on."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """The expected clean images, (B, C, H, W)."""
        ...


@runtime_checkable
class SharedEncoder(Protocol):
    """A network whose first part sees neither time nor condition."""

    def encode(self, x_t: Tensor) -> tuple[Tensor, ...]:
        """Features of the noisy images, each (B, ...)."""
        ...

    def decode(self, features: tuple[Tensor, ...], t: Tensor, cond: Tensor | None) -> Tensor:
        """The network's output from those features.

        Args:
            features: of B images.
            t: times, (k B,).
            cond: k conditions for each image, (k B, D), those of all images together; or None.

        Returns:
            (k B, C, H, W).
        """
        ...


class Denoiser(nn.Module):
    """A network made into E[x_0 | x_t].

    Times may lie on the host, whatever the images lie on: levels are taken where the times are, and a schedule looks at
    its times, so that times on a device would be waited for.

    Args:
        network: called as network(x_t, t, cond) with x_t (B, C, H, W), t (B,) in (0, 1] and cond (B, D) or None;
            returns (B, C, H, W). If it is a `SharedEncoder`, its encoder runs once for all branches of a guided
            call.
        schedule: signal and noise levels.
        target: what the network predicts.
        loss: distance on the target; huber is smooth L1 with beta 1.
        weighting: factor of the loss, see `diffusion.weighting`.

    Raises:
        AntherError: an unknown target or loss; an eps target on a schedule without signal at t = 1 (the noise then
            says nothing about x_0); a weighting that is 0 at t = 1; a network made for another number of steps than the
            schedule has.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        target: Target = "eps",
        loss: Loss = "mse",
        weighting: Weighting = unit,
    ) -> None:
        super().__init__()
        if target not in TARGETS:
            raise AntherError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}.")
        if loss not in LOSSES:
            raise AntherError(f"unknown loss {loss!r}: choose one of {', '.join(LOSSES)}.")
        if target == "eps" and schedule.terminal_alpha < 1e-8:
            raise AntherError("the eps target cannot be learnt on a schedule with no signal at t = 1: use target=v.")
        if not weighting(*schedule(torch.ones(1, dtype=torch.float64)), target).all():
            raise AntherError(
                "on a schedule with no signal at t = 1 this weighting gives that time no weight, where every drawing "
                "begins: use weighting=unit, or a schedule with a signal there, such as schedule=cosine."
            )
        if getattr(network, "T", schedule.T) != schedule.T:
            raise AntherError(
                f"the network counts T = {network.T} steps and the schedule {schedule.T}: set network.T and schedule.T "
                "to the same number."
            )
        self.network = network
        self.schedule = schedule
        self.target = target
        self.distance = LOSSES[loss]
        self.weighting = weighting

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for times (B,), shaped (B, 1, 1, 1), of the type and on the device of `like`."""
        alpha, sigma = self.schedule(t)
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (upload(level, like.device, like.dtype) for level in (alpha, sigma))
        return alpha.view(shape), sigma.view(shape)

    def diffuse(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.levels(t, x_0)
        return alpha * x_0 + sigma * eps

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t] for x_t (B, C, H, W) at times t (B,), given cond (B, D)."""
        output = self.network(x_t, upload(t, x_t.device), cond).to(x_t.dtype)
        return to_x_0(self.target, output, x_t, *self.levels(t, x_t))

    def branches(self, x_t: Tensor, t: Tensor, conds: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """E[x_0 | x_t] under several conditions, in one network call.

        What the network computes before it looks at time and condition is computed once and shared.

        Args:
            x_t: (B, C, H, W).
            t: (B,).
            conds: k tensors (B, D).

        Returns:
            k tensors (B, C, H, W), each what `forward` returns for that condition.
        """
        k = len(conds)
        times = upload(t.repeat(k), x_t.device)
        cond = torch.cat(list(conds))
        network = self.network
        if isinstance(network, SharedEncoder):
            output = network.decode(network.encode(x_t), times, cond)
        else:
            output = network(x_t.repeat(k, 1, 1, 1), times, cond)
        levels = self.levels(t, x_t)
        return tuple(to_x_0(self.target, part.to(x_t.dtype), x_t, *levels) for part in output.chunk(k))

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor, cond: Tensor | None = None) -> Tensor:
        """Weighted distance between the network's output and the target, one value per sample, float32 (B,)."""
        alpha, sigma = self.levels(t, x_0)
        output = self.network(alpha * x_0 + sigma * eps, upload(t, x_0.device), cond)
        wanted = from_x_0(self.target, x_0, eps, alpha, sigma)
        distance = self.distance(output.float(), wanted.float(), reduction="none").flatten(1).mean(1)
        weight: Tensor = self.weighting(*self.schedule(t), self.target)
        return distance * upload(weight, distance.device, distance.dtype)


LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.smooth_l1_loss}
