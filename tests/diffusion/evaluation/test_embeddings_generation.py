"""Embeddings taken while images are drawn: each is of its own image, of the right moment and the right branch."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.conditioning.labels import Labels
from diffusion.denoiser import Denoiser
from diffusion.errors import AntherError
from diffusion.evaluation.embeddings import Embedding, capture, open_rows, reduced, sample_embedded
from diffusion.modules.diffusion import ClassifierFreeDiffusion, Diffusion
from diffusion.networks.unet import UNet
from diffusion.samplers import DDIM, DDPM
from diffusion.samplers.base import Sampler
from diffusion.schedules import Linear

T, N, CLASSES = 10, 7, ("daisy", "roses", "tulips")
PROMPTS = [("a daisy", "two roses", "tulips")[k % 3] for k in range(N)]
SEEDS = [20 + k for k in range(N)]


class Telltale(nn.Module):
    """Its layer gives out what it is asked: the image, the time and the condition."""

    img_ch, img_size, c_embed_dim = 1, 2, 3

    def __init__(self):
        super().__init__()
        self.down2 = nn.Identity()
        self.never = nn.ModuleList([nn.Identity()])

    def forward(self, x_t, t, cond=None):
        cond = x_t.new_zeros(len(x_t), 3) if cond is None else cond
        seen = self.down2(torch.cat([x_t.flatten(1), t[:, None].to(x_t), cond], 1))
        return 0.3 * x_t + 0.1 * seen[:, 5:].sum(1).view(-1, 1, 1, 1)


class TwoCalls(Sampler):
    """Asks twice per step, the second time about another image."""

    def step(self, denoiser, x_t, t, s, rng, before):
        x_0 = denoiser(x_t, t)
        again = denoiser(x_t + 1, t)
        return x_t + (s - t).item() * (x_0 + again), x_0


def telltale(conditional=True):
    denoiser = Denoiser(Telltale(), Linear(T))
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
    if not conditional:
        return Diffusion(denoiser, DDIM(3), optimizer).eval()
    return ClassifierFreeDiffusion(denoiser, DDIM(3), optimizer, Labels(CLASSES)).eval()


def unet():
    torch.manual_seed(0)
    network = UNet(T, 3, 8, (32, 32, 32), c_embed_dim=3, family="handson", self_attention=True)
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
    return ClassifierFreeDiffusion(Denoiser(network, Linear(T)), DDIM(3), optimizer, Labels(CLASSES)).eval()


def in_batches(model, embedding, size, prompts=PROMPTS, weight=2.0, sampler=None):
    rows = []
    for k in range(0, N, size):
        part = None if prompts is None else prompts[k : k + size]
        rows.append(sample_embedded(model, embedding, part, SEEDS[k : k + size], weight, sampler)[1])
    return torch.cat(rows)


def alone(model, k, sampler, weight=2.0, prompts=PROMPTS):
    """The steps of image k, drawn by itself."""
    steps = []
    model.sample(None if prompts is None else prompts[k : k + 1], SEEDS[k : k + 1], weight, sampler, steps.append)
    return steps


@pytest.mark.parametrize("size", [1, 3, N])
@pytest.mark.parametrize("sampler", [DDPM(), DDIM(4, eta=0.5)])
@pytest.mark.parametrize("when", ["last", "clean", "trace"])
def test_row_i_is_of_image_i_and_of_the_branch_with_the_condition(when, sampler, size):
    model = telltale()
    picked = (3, 0) if when == "trace" else ()
    got = in_batches(model, Embedding(form="flat", when=when, steps=picked), size, sampler=sampler)
    assert got.dtype == torch.float32
    for k in range(N):
        steps = alone(model, k, sampler)
        cond = [float(c == CLASSES[k % 3]) for c in ("daisy", "roses", "tulips")]
        asked = {
            "last": [(steps[-1].x_t, steps[-1].t)],
            "clean": [(steps[-1].x_s, 1 / T)],
            "trace": [(steps[number].x_t, steps[number].t) for number in picked],
        }[when]
        wanted = torch.stack([torch.tensor([*x.flatten().tolist(), t, *cond]) for x, t in asked])
        torch.testing.assert_close(got[k] if when == "trace" else got[k][None], wanted, rtol=1e-5, atol=1e-6)


def test_the_images_are_those_of_a_draw_without_embeddings():
    model = telltale()
    for when, steps in (("last", ()), ("clean", ()), ("trace", (1,))):
        images, _ = sample_embedded(model, Embedding(when=when, steps=steps), PROMPTS, SEEDS, 2.0, DDPM())
        assert torch.equal(images, model.sample(PROMPTS, SEEDS, 2.0, DDPM()))


def test_a_solver_that_asks_twice_per_step_is_taken_at_its_word_the_second_time():
    model = telltale()
    last = in_batches(model, Embedding(form="flat"), 3, sampler=TwoCalls(4))
    trace = in_batches(model, Embedding(form="flat", when="trace", steps=(2, 0)), 3, sampler=TwoCalls(4))
    for k in range(N):
        x_t = torch.stack([step.x_t[0].flatten() for step in alone(model, k, TwoCalls(4))])
        torch.testing.assert_close(last[k, :4], x_t[-1] + 1, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(trace[k, :, :4], x_t[[2, 0]] + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("when", ["last", "clean"])
def test_without_a_condition(when):
    model = telltale(conditional=False)
    got = in_batches(model, Embedding(form="flat", when=when), 3, None, None)
    for k in range(N):
        end = alone(model, k, None, None, None)[-1]
        wanted = end.x_t if when == "last" else end.x_s
        torch.testing.assert_close(got[k, :4], wanted.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 2.0])
@pytest.mark.parametrize("layer", ["down2", "up1"])
def test_layers_of_the_real_network_before_and_behind_the_condition(layer, weight):
    model = unet()
    images, got = sample_embedded(model, Embedding(layer=layer, form="raw"), PROMPTS, SEEDS, weight)
    network = model.denoiser.network
    x_t = torch.cat([alone(model, k, None, weight)[-1].x_t for k in range(N)])
    t = torch.full((N,), alone(model, 0, None, weight)[-1].t, dtype=torch.float64)
    with torch.no_grad(), capture(network, layer) as captured:
        network(x_t, t, torch.eye(3)[[k % 3 for k in range(N)]])
    torch.testing.assert_close(got, captured.rows(N), rtol=1e-3, atol=1e-4)
    if layer == "down2":
        assert got.shape == (N, 32, 2, 2)
        with torch.no_grad():
            torch.testing.assert_close(got, network.down2(network.down1(network.down0(x_t))), rtol=1e-3, atol=1e-4)
    for form, shape in (("flat", math.prod(got.shape[1:])), ("pooled", got.shape[1])):
        again = sample_embedded(model, Embedding(layer=layer, form=form), PROMPTS, SEEDS, weight)
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], reduced(got, form))
        assert again[1].shape == (N, shape)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "mean"}, "embedding.form is pooled, flat or raw, not 'mean'"),
        ({"when": "first"}, "embedding.when is last, clean or trace, not 'first'"),
        ({"steps": (1,)}, "goes with embedding.when=trace"),
        ({"when": "trace"}, r"numbers of steps.*not \[\]"),
        ({"when": "trace", "steps": [0, 0]}, "each once"),
        ({"when": "trace", "steps": [-1]}, "counted from 0"),
        ({"when": "trace", "steps": ["2"]}, "numbers of steps"),
        ({"when": "trace", "steps": [True]}, "numbers of steps"),
    ],
)
def test_what_is_no_embedding_is_refused(options, says):
    with pytest.raises(AntherError, match=says):
        Embedding(**options)


def test_steps_may_come_as_a_list_or_not_at_all():
    assert Embedding(when="trace", steps=[2, 0]).steps == (2, 0)
    assert Embedding(steps=None).steps == ()


@pytest.mark.parametrize(
    ("model", "embedding", "says"),
    [
        (telltale, Embedding(layer="down3"), "no layer 'down3'.*down2"),
        (telltale, Embedding(layer="never"), "never called its layer 'never'"),
        (unet, Embedding(layer="mid_block.1.mha"), "gives out a tuple"),
        (telltale, Embedding(when="trace", steps=(1, 3)), r"\[3\].*fewer steps"),
    ],
)
def test_what_the_model_does_not_have_is_refused(model, embedding, says):
    with pytest.raises(AntherError, match=says):
        sample_embedded(model(), embedding, PROMPTS, SEEDS, 1.0)


def test_load(tmp_path):
    with pytest.raises(AntherError, match=r"no embeddings at .*embeddings\.npy"):
        open_rows(tmp_path)
    rows = np.random.default_rng(0).normal(size=(5, 3, 2)).astype(np.float32)
    np.save(tmp_path / "embeddings.npy", rows)
    assert np.array_equal(open_rows(tmp_path)[:], rows.reshape(5, 6))
    whole = (tmp_path / "embeddings.npy").read_bytes()
    for content in (b"", b"nonsense", whole[:-8]):
        (tmp_path / "embeddings.npy").write_bytes(content)
        with pytest.raises(AntherError, match=r"embeddings\.npy is damaged"):
            open_rows(tmp_path)
