"""The ADM U-Net, held against diffusers."""

import pytest
import torch
from diffusers import UNet2DModel

from diffusion.errors import AntherError
from diffusion.networks.adm import ADM


def theirs(size, channels, mult, blocks, attention, head):
    resolutions = [size // 2**k for k in range(len(mult))]
    return UNet2DModel(
        sample_size=size,
        down_block_types=["AttnDownBlock2D" if r in attention else "ResnetDownsampleBlock2D" for r in resolutions],
        up_block_types=["AttnUpBlock2D" if r in attention else "ResnetUpsampleBlock2D" for r in resolutions[::-1]],
        block_out_channels=[channels * m for m in mult],
        layers_per_block=blocks,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=head,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()


def ours(size=16, channels=32, mult=(1, 2), blocks=1, attention=(8,), head=16, **options):
    torch.manual_seed(0)
    return ADM(1000, 3, size, channels, mult, blocks, attention, head, **options)


CONFIGS = [
    (16, 32, (1, 2, 3), 2, (8, 4), 16),
    (16, 64, (1, 2), 1, (), 32),
    (8, 32, (1, 1), 3, (8,), 8),
    (8, 32, (2,), 2, (), 64),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_forward_pass_and_the_names_are_those_of_diffusers(config):
    network, oracle = ours(*config).eval(), theirs(*config)
    network.load_state_dict(oracle.state_dict())
    x_t, index = torch.randn(3, 3, config[0], config[0]), torch.tensor([0, 6, 999])
    with torch.no_grad():
        expected = oracle(x_t, index).sample
        assert torch.allclose(network(x_t, (index.double() + 1) / 1000), expected, atol=1e-4)
    oracle.load_state_dict(network.state_dict())


@pytest.mark.parametrize(("size", "blocks", "attention"), [(32, 3, [16]), (64, 2, [16])])
def test_the_sizes_of_the_experiments_have_as_many_parameters(size, blocks, attention):
    with torch.device("meta"):
        network = ADM(1000, 3, size, num_blocks=blocks, attention_resolutions=attention)
        oracle = theirs(size, 128, (1, 2, 2, 2), blocks, attention, 64)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in oracle.parameters())


def test_an_untrained_network_gives_zeros_and_learns_everywhere():
    network = ours(c_embed_dim=4)
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1.0]), torch.randn(2, 4)
    assert not network(*inputs).any()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_a_condition_is_added_to_time_and_zeros_mean_none():
    network = ours(c_embed_dim=4).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_t, t, cond = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1.0]), torch.eye(4)[:2]
    with torch.no_grad():
        assert torch.equal(network(x_t, t), network(x_t, t, torch.zeros(2, 4)))
        assert (network(x_t, t, cond) - network(x_t, t)).abs().max() > 1e-3
    with pytest.raises(AntherError, match="conditions of width 4 and was given 3"):
        network(x_t, t, torch.randn(2, 3))


def test_dropout_is_drawn_in_training_alone():
    network = ours(dropout=0.5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 1.0])
    with torch.no_grad():
        assert not torch.equal(network(*inputs), network(*inputs))
        network.eval()
        assert torch.equal(network(*inputs), network(*inputs))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 15}, "must divide by 2"),
        ({"channels": 48}, "multiples of 32"),
        ({"mult": ()}, "needs 1 or more"),
        ({"attention": (7,)}, "has 7, and the network works at 16, 8 pixels"),
        ({"head": 24}, "must divide the channels"),
        ({"blocks": 0}, "num_blocks"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_settings(options, says):
    with pytest.raises(AntherError, match=says):
        ours(**options)
