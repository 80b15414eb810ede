import functools
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.conditioning.labels import Labels
from diffusion.denoiser import Denoiser
from diffusion.errors import AntherError
from diffusion.modules.diffusion import ClassifierFreeDiffusion, Diffusion
from diffusion.networks.annotated import AnnotatedUNet
from diffusion.networks.unet import UNet
from diffusion.pictures import CONF, main, make_sampler, make_schedule
from diffusion.samplers import DDIM, DDPM
from diffusion.schedules import Cosine, Linear, Straight
from diffusion.visualise import (
    NOISE_SHOWN,
    attention_strip,
    decibel,
    denoising_strip,
    draw_schedules,
    forward_strip,
    heated,
    noise_like,
    progress_picture,
    reverse_strip,
    schedule_row,
)

ADAM = functools.partial(torch.optim.Adam, lr=1e-3)
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def model(T=10, **network):
    torch.manual_seed(0)
    made = AnnotatedUNet(T, 3, 8, **{"dim": 8} | network)
    return Diffusion(Denoiser(made, Linear(T)), DDIM(5), ADAM).eval()


def test_the_forward_process_is_one_path_per_image():
    schedule, times = Cosine(100), [0.0, 0.3, 1.0]
    strip = forward_strip(IMAGES, schedule, times, seed=3)
    assert (strip.columns, len(strip.images), len(strip.captions)) == (3, 6, 6)
    eps = noise_like(IMAGES, 3)
    for row in range(2):
        for column, t in enumerate(times):
            alpha, sigma = schedule(torch.tensor(t))
            expected = alpha.float() * IMAGES[row] + sigma.float() * eps[row]
            assert torch.allclose(strip.images[3 * row + column], expected, atol=1e-6)
    assert strip.captions[:2] == ["t = 0, no noise", f"t = 0.3, {decibel(float(schedule.snr(torch.tensor(0.3))))}"]
    with pytest.raises(AntherError, match=r"lie in \[0, 1\], and 1.5"):
        forward_strip(IMAGES, schedule, [1.5])
    assert [decibel(x) for x in (0.0, 1.0, 100.0)] == ["no signal", "0.0 dB", "20.0 dB"]


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_a_row_of_denoising_is_what_the_denoiser_says(target):
    made = model()
    made.denoiser.target = target
    strip = denoising_strip(made, IMAGES, None, [0.1, 0.9], seed=1)
    rows = strip.images.unflatten(0, (2, 2, 5))  # image, time, column
    eps = noise_like(IMAGES, 1)
    for k, time in enumerate((0.1, 0.9)):
        t = torch.full((2,), time, dtype=torch.float64)
        x_t = made.denoiser.diffuse(IMAGES, t, eps)
        with torch.no_grad():
            expected = made.denoiser(x_t, t)
        alpha, sigma = made.denoiser.levels(t, IMAGES)
        wanted = [IMAGES, x_t, NOISE_SHOWN * eps, NOISE_SHOWN * (x_t - alpha * expected) / sigma, expected]
        for column, images in enumerate(wanted):
            assert torch.allclose(rows[:, k, column], images, atol=1e-4), (time, column)
    assert strip.captions[5:7] == ["x_0", "x_t at t = 0.9"]
    with torch.no_grad():  # an eps network's own output is the noise that it sees
        if target == "eps":
            shown = made.trained(x_t, t) * NOISE_SHOWN
            assert torch.allclose(rows[:, 1, 3], shown, atol=1e-4)
    with pytest.raises(AntherError, match="times lie in"):
        denoising_strip(made, IMAGES, None, [0.0], seed=1)


def test_the_way_back_begins_as_noise_and_ends_as_the_image():
    made, seen = model(), []
    strip = reverse_strip(made, None, [4, 5], None, DDPM(8), frames=3)
    images = made.sample(None, [4, 5], sampler=DDPM(8), hook=seen.append)
    assert strip.columns == 3
    rows = strip.images.unflatten(0, (2, 2, 3))  # image, x_t or x_0, column
    for k in range(2):
        for column, (noisy, clean) in enumerate([(seen[0].x_t, seen[0].x_0), (seen[4].x_t, seen[4].x_0)]):
            assert torch.equal(rows[k, 0, column], noisy[k])
            assert torch.equal(rows[k, 1, column], clean[k])
        assert torch.equal(rows[k, 0, 2], images[k])
    assert strip.captions[0] == "x_t, t = 1"
    assert strip.captions[2] == "x_t, t = 0"
    # More columns than steps: every step once.
    assert reverse_strip(made, None, [4], None, DDPM(2), frames=9).columns == 3
    with pytest.raises(AntherError, match="frames"):
        reverse_strip(made, None, [4], None, None, frames=1)


def test_attention_is_shown_from_the_place_that_was_asked_for():
    made = model(attention=[None, None, None], middle_attention="full")
    strip = attention_strip(made, IMAGES, None, 0.5, (0.6, 0.1), seed=2)
    assert strip.columns == 3
    assert strip.captions[2] == "mid_attn.fn.fn, 2 x 2"
    layer, kept = made.trained.mid_attn.fn.fn, []
    handle = layer.register_forward_hook(lambda m, inputs, out: kept.append(inputs[0]))
    t = torch.full((2,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        made.denoiser(made.denoiser.diffuse(IMAGES, t, noise_like(IMAGES, 2)), t)
        handle.remove()
        # Across 0.6 and down 0.1 of 2 x 2: the upper right of the four.
        weights = layer.weights(kept[0])[:, :, 1].mean(1).reshape(2, 1, 2, 2)
    heat = (weights / weights.amax((2, 3), keepdim=True)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.allclose(strip.images[2::3], heated(IMAGES, heat), atol=1e-5)
    for place in ((1.0, 0.5), (0.5, -0.1)):
        with pytest.raises(AntherError, match="outside the image"):
            attention_strip(made, IMAGES, None, 0.5, place, seed=2)
    with pytest.raises(AntherError, match="no attention"):
        attention_strip(model(attention=[None] * 3, middle_attention=None), IMAGES, None, 0.5, (0.5, 0.5), seed=2)


def test_conditions_reach_the_model():
    torch.manual_seed(0)
    network = UNet(10, 3, 8, (32, 32, 32), c_embed_dim=2, family="handson", self_attention=True)
    made = ClassifierFreeDiffusion(Denoiser(network, Linear(10)), DDIM(2), ADAM, Labels(["a", "b"])).eval()
    encode = made.conditioner.encode
    by_cond = [denoising_strip(made, IMAGES, encode([c, c]), [0.5], 0).images[4] for c in "ab"]
    by_prompt = [reverse_strip(made, [c, c], [0, 1], 1.0, None, 2).images[-1] for c in "ab"]
    by_weight = [reverse_strip(made, ["a"], [0], w, None, 2).images[-1] for w in (0.0, 3.0)]
    assert not torch.equal(*by_cond)
    assert not torch.equal(*by_prompt)
    assert not torch.equal(*by_weight)


def test_the_numbers_of_schedules():
    # Published values of the linear schedule: sqrt of alpha-bar at the end.
    for T, alpha in ((100, 0.603), (200, 0.364), (400, 0.132), (1000, 0.0064)):
        row = schedule_row("linear", Linear(T))
        assert row.terminal_alpha == pytest.approx(alpha, abs=5e-4)
        assert row.terminal_snr == pytest.approx(alpha**2 / (1 - alpha**2), rel=2e-2)
        assert (row.beta_first, row.beta_last) == (pytest.approx(1e-4), pytest.approx(0.02))
    straight = schedule_row("straight", Straight(1000))
    assert straight.crossing == pytest.approx(0.5, abs=1e-4)
    assert (straight.alpha_bar_half, straight.snr_half, straight.terminal_snr) == (0.25, 1.0, 0.0)


def test_every_schedule_of_the_config_can_be_drawn():
    names = sorted(path.stem for path in (CONF / "schedule").glob("*.yaml"))
    made = {(name, 100): make_schedule(name, 100) for name in names}
    assert all(schedule.T == T for (_, T), schedule in made.items())
    figure = draw_schedules(made)
    assert [len(axes.lines) for axes in figure.axes] == [len(names)] * 2 + [len(names) + 1, len(names)]
    lines = figure.axes[1].lines
    assert len({line.get_color() for line in lines}) == len(names)
    assert [line.get_linewidth() for line in lines] == sorted((k + 1.2 for k in range(len(names))), reverse=True)
    assert "an SNR of 0 is drawn at 1e-10" in figure.axes[3].get_title()
    line = lines[0]
    assert np.allclose(line.get_ydata(), made[names[0], 100](torch.linspace(0, 1, 101))[0] ** 2)


def test_every_sampler_of_the_config_is_to_be_had():
    for path in sorted((CONF / "sampler").glob("*.yaml")):
        sampler, shorter = make_sampler(path.stem, None), make_sampler(path.stem, 7)
        assert (sampler.clip, shorter.steps) == (True, 7)
        assert type(sampler).__name__ == {"ddpm": "DDPM", "heun": "Heun"}.get(
            path.stem, "DPMpp" if path.stem.startswith("dpmpp") else "DDIM"
        )
    assert (make_sampler("ddpm", None).steps, make_sampler("ddim", None).steps) == (None, 50)
    assert make_sampler("dpmpp_sde", None).sde
    with pytest.raises(
        AntherError, match=r"no sampler 'plms': choose from ddim, ddpm, dpmpp, dpmpp_sde, euler, heun\."
    ):
        make_sampler("plms", None)
    with pytest.raises(AntherError, match="1 step or more, not 0"):
        make_sampler("heun", 0)


def test_samples_over_training_stand_below_each_other(tmp_path):
    (tmp_path / "samples").mkdir()
    for k in range(7):
        step = 10 * k + 10
        Image.new("RGB", (30, 20), (30 * k, 0, 0)).save(tmp_path / "samples" / f"step-{step:06d}.png")
        (tmp_path / "samples" / f"step-{step:06d}.json").write_text(f'{{"epoch": {k}}}')
    page = np.asarray(progress_picture(tmp_path, most=3))
    assert page.shape == (3 * 42, 30, 3)
    assert [int(page[42 * k + 41, 29, 0]) for k in range(3)] == [0, 90, 180]
    # Six digits, and seven.
    for step, red in ((200_000, 210), (1_000_000, 240)):
        Image.new("RGB", (30, 20), (red, 0, 0)).save(tmp_path / "samples" / f"step-{step:06d}.png")
    page = np.asarray(progress_picture(tmp_path, most=20))
    assert [int(row[29, 0]) for row in page.reshape(-1, 42, 30, 3)[:, 41]][-3:] == [180, 210, 240]
    with pytest.raises(AntherError, match="no pictures"):
        progress_picture(tmp_path / "nowhere")


def _declaring(png, width, height):
    """The same PNG with another size in its header."""
    chunk = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def test_the_commands_that_need_no_model(tmp_path, capsys):
    main(["schedules", "linear", "cosine", "--T", "10", "20", "--out", str(tmp_path)])
    lines = (tmp_path / "schedules.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("name,T,beta_first")
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.png")
    main(["forward", str(tmp_path / "a.png"), "--size", "16", "--t", "0", "0.5", "1", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "forward.png").width == 3 * (128 + 6) + 6
    assert str(tmp_path / "forward.png") in capsys.readouterr().out
    content = (tmp_path / "a.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)).save(tmp_path / "chunk.png")
    first, second, *rest = (tmp_path / "chunk.png").read_bytes().split(b"IDAT")
    (tmp_path / "chunk.png").write_bytes(b"IDAT".join([first, second]) + b"?!?!" + b"IDAT".join(rest))
    (tmp_path / "huge.png").write_bytes(_declaring(content, 30_000, 30_000))
    (tmp_path / "large.png").write_bytes(_declaring(content, 9000, 9000))
    for words, says in (
        (["forward", str(tmp_path / "chunk.png")], r"chunk\.png cannot be read as an image \(broken PNG.*\): give"),
        (["forward", str(tmp_path / "huge.png")], r"huge\.png cannot be read as an image \(declares far too many"),
        (["forward", str(tmp_path / "large.png")], r"large\.png cannot be read as an image \(declares 9000 x 9000"),
        (["forward", str(tmp_path / "a.png"), "--size", "0"], "--size 0 counts pixels: 1 or more"),
        (["schedules", "flat"], "no schedule 'flat': choose from cosine"),
        (["schedules", "--T", "1"], "2 or more"),
        (["forward", str(tmp_path / "schedules.csv")], "cannot be read as an image"),
        (["reverse", str(tmp_path / "none.ckpt")], "no checkpoint"),
    ):
        with pytest.raises(AntherError, match=says):
            main([*words, "--out", str(tmp_path)])
