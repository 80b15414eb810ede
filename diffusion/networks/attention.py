"""Self-attention over the pixels of a map, and where it looked.

Every layer here has `weights(x)`: the map (B, heads, queries, keys) that its output is mixed with, each row summing to
one. It is computed when it is asked for and not before, so that training keeps the fused kernel.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@runtime_checkable
class Attends(Protocol):
    """A layer that can say where it looks."""

    def weights(self, x: Tensor) -> Tensor:
        """Of the input (B, C, H, W) of `forward`: (B, heads, H W, H W), rows of queries summing to one."""
        ...


class FullAttention(nn.Module):
    """Softmax attention: softmax(q^T k / sqrt(d)) v (Vaswani et al., 2017, arXiv 1706.03762).

    Memory and time grow with the square of the number of pixels. Parameter names are seed 004's.

    Args:
        c: channels.
        heads: attention heads.
        dim_head: channels per head; `heads * dim_head` need not be `c`.
    """

    def __init__(self, c: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(c, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, c, 1)

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, H W, d)."""
        q, k, v = (part.unflatten(1, (self.heads, -1)).flatten(3).mT for part in self.to_qkv(x).chunk(3, 1))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = self._tokens(x)
        mixed = scaled_dot_product_attention(q, k, v).mT
        out: Tensor = self.to_out(mixed.reshape(len(x), -1, *x.shape[2:]))
        return out

    def weights(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, _ = self._tokens(x)
        return softmax_weights(q, k)


class LinearAttention(nn.Module):
    """Attention in linear time: softmax over the channels of q and over the pixels of k, then q (k^T v).

    As a map over pixels it is the product of both, whose rows sum to one (Shen et al., 2021, arXiv 1812.01243).
    Parameter names are seed 004's.

    Args:
        c: channels.
        heads: attention heads.
        dim_head: channels per head.
    """

    def __init__(self, c: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_qkv = nn.Conv2d(c, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * dim_head, c, 1), nn.GroupNorm(1, c))

    def _tokens(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmaxed queries and keys, and values, each (B, heads, d, H W)."""
        q, k, v = (part.unflatten(1, (self.heads, -1)).flatten(3) for part in self.to_qkv(x).chunk(3, 1))
        return q.softmax(2), k.softmax(3), v

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = self._tokens(x)
        mixed = (v @ k.mT) @ (q * self.scale)
        out: Tensor = self.to_out(mixed.reshape(len(x), -1, *x.shape[2:]))
        return out

    def weights(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, _ = self._tokens(x)
        return q.mT @ k


def softmax_weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) of (..., n, d) queries and (..., m, d) keys: (..., n, m)."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)


@contextmanager
def attention_maps(network: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within a block, every call of the network leaves the maps of its attention layers here.

    Yields:
        By the layer's name in `network.named_modules()`, in the order of the calls: the map of its latest call,
        (B, heads, queries, keys), float32.
    """
    found: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        @torch.no_grad()
        def hook(module: Attends, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = module.weights(inputs[0]).float()

        return hook

    layers = {name: module for name, module in network.named_modules() if isinstance(module, Attends)}
    handles = [module.register_forward_hook(listen(name)) for name, module in layers.items()]  # type: ignore[attr-defined]
    try:
        # Compiled code does not look for hooks that came after it.
        with torch.compiler.set_stance("force_eager"):
            yield found
    finally:
        for handle in handles:
            handle.remove()
