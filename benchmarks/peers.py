"""What ours is measured against: the same networks and loops, written the plain way."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from diffusion.networks.blocks import sinusoidal
from diffusion.networks.unet import UNet

T = 400
CONF = Path(__file__).parents[1] / "conf"


class PlainUNet(UNet):
    """The same function of the same weights as the published code computes it: maps are doubled, joined, convolved."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        cond = x_t.new_zeros(len(x_t), self.c_embed_dim) if cond is None else cond
        time = sinusoidal((t - 1 / self.T).to(x_t.dtype), self.t_embed_dim)
        down0 = self.down0(x_t)
        down1 = self.down1(down0)
        down2 = self.down2(down1)
        if self.family == "course":
            x, skips = self.up0(self.dense_emb(self.to_vec(down2))), (down2, down1)
        else:
            x, skips = self.up0(self.mid_block(down2)), (down1, down0)
        x = self._up(self.up1, self.c_embed1(cond) * x + self.t_emb1(time), skips[0])
        x = self._up(self.up2, self.c_embed2(cond) * x + self.t_emb2(time), skips[1])
        out: Tensor = torch.nn.Sequential(*self.out)(torch.cat([x, down0], 1))
        return out

    def _up(self, block: torch.nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        if self.family == "course":
            out: Tensor = block.model(torch.cat([x, skip], 1))
            return out
        joined = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], 1)
        out = block.model(block.conv_in(joined))
        return out


def make_network(name: str, kind: type[UNet] = UNet) -> UNet:
    """The network of conf/network/<name>.yaml for three channels of 32 pixels, with the same weights for each kind."""
    node = yaml.safe_load((CONF / "network" / f"{name}.yaml").read_text())
    del node["_target_"]
    torch.manual_seed(0)
    return kind(**{**node, "T": T, "img_ch": 3, "img_size": 32})


class Loop(ABC):
    """A loop over tensors in memory; what a step does is the kind's own."""

    def __init__(self, network: UNet, images: Tensor, batch_size: int, device: str) -> None:
        self.network, self.device = network.to(device), device
        self.loader = DataLoader(TensorDataset(images), batch_size, shuffle=True, drop_last=True)
        self.batches = self._forever()

    def _forever(self) -> Iterator[Tensor]:
        while True:
            for (images,) in self.loader:
                yield images

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(next(self.batches).to(self.device))

    @abstractmethod
    def step(self, x_0: Tensor) -> None: ...


class Notebook(Loop):
    """The course's: contiguous float32, uniform times, noise from the global generator, Adam."""

    def __init__(self, network: UNet, images: Tensor, batch_size: int, device: str) -> None:
        super().__init__(network, images, batch_size, device)
        abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, device=device), 0)
        self.signal, self.noise = abar.sqrt(), (1 - abar).sqrt()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        x_t = self.signal[t].view(-1, 1, 1, 1) * x_0 + self.noise[t].view(-1, 1, 1, 1) * eps
        # The network counts time from 1 to T where the notebook counts from 0.
        return F.mse_loss(eps, self.network(x_t, (t + 1) / T))

    def step(self, x_0: Tensor) -> None:
        self.optimizer.zero_grad()
        t = torch.randint(0, T, (len(x_0),), device=self.device)
        self.loss(x_0, t, torch.randn_like(x_0)).backward()
        self.optimizer.step()


class Diffusers(Loop):
    """diffusers' `train_unconditional.py` with its defaults: AdamW, gradient norm 1, warm-up and cosine, its EMA.

    Without accelerate, which on one device in float32 changes nothing, and in bf16 sets autocast around the network.

    Args:
        bf16: its `--mixed_precision=bf16`.
    """

    def __init__(self, network: UNet, images: Tensor, batch_size: int, device: str, bf16: bool = False) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        super().__init__(network, images, batch_size, device)
        self.bf16 = bf16
        self.noise_scheduler = DDPMScheduler(num_train_timesteps=T)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rate = get_scheduler("cosine", self.optimizer, num_warmup_steps=500, num_training_steps=10_000)
        self.ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        x_t = self.noise_scheduler.add_noise(x_0, eps, t)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            output = self.network(x_t, (t + 1) / T)
        return F.mse_loss(output.float(), eps.float())

    def step(self, x_0: Tensor) -> None:
        noise = torch.randn(x_0.shape, device=self.device)
        self.loss(x_0, torch.randint(0, T, (len(x_0),), device=self.device).long(), noise).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.network.parameters())
