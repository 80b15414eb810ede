"""CLIP's transformer blocks by way of oneDNN, where torch's own matrix product is slower (docs/performance.md)."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_CPU = Path("/proc/cpuinfo")  # as Linux has it


@functools.cache
def pays() -> bool:
    """Whether this is an AMD processor with AVX-512: torch's BLAS, MKL, has half of oneDNN's rate there."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return _CPU.is_file() and "AuthenticAMD" in _CPU.read_text()


def by_onednn(network: nn.Module) -> None:
    """Replaces the layers of open_clip's blocks in place; their weights stay the same tensors, in new modules.

    Towers of other libraries (timm, Hugging Face) and ResNets have no such blocks and stay as they are. On another
    device than the CPU the new layers compute as the old ones do.

    Args:
        network: a frozen CLIP of open_clip.
    """
    from open_clip.transformer import ResidualAttentionBlock

    blocks: list[Any] = [part for part in network.modules() if isinstance(part, ResidualAttentionBlock)]
    for block in blocks:
        block.mlp.c_fc, block.mlp.c_proj = (
            _Linear(part.weight, part.bias) for part in (block.mlp.c_fc, block.mlp.c_proj)
        )
        if block.attn.batch_first and not hasattr(block, "ln_1_kv"):  # which attends to another tower
            block.attn = _SelfAttention(block.attn)


class _Linear(nn.Module):
    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return nn.functional.linear(x, self.weight, self.bias)
        # The weights are converted in each call, which costs little beside the product and keeps one copy of them.
        return nn.functional.linear(x.to_mkldnn(), self.weight.to_mkldnn(), self.bias.to_mkldnn()).to_dense()


class _SelfAttention(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.into = _Linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out = _Linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """As the blocks call nn.MultiheadAttention: `key` and `value` are `x`, and the mask is added to the scores."""
        b, n, width = x.shape
        if attn_mask is not None and attn_mask.ndim == 3:  # one for each text and head
            attn_mask = attn_mask.view(b, self.heads, n, n)
        q, k, v = self.into(x).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out(mixed.transpose(1, 2).reshape(b, n, width)), None
