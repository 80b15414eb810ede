"""Editing on denoisers that are known in closed form, and on a network whose arithmetic no batch changes."""

import functools
import hashlib

import pytest
import torch
from PIL import Image

from datamodules.folders import decode_square
from diffusion.denoiser import Denoiser
from diffusion.editing import Edit, diffuse, read_edit
from diffusion.errors import AntherError
from diffusion.images import from_uint8, to_uint8
from diffusion.modules.diffusion import Diffusion
from diffusion.rng import ImageRNG
from diffusion.samplers import DDIM, DDPM, DPMpp, Heun
from diffusion.samplers.grids import GRIDS, beginning_at
from diffusion.schedules import Cosine, Linear, Straight, ZeroTerminalSNR
from diffusion.trajectory import Trajectory
from tests.diffusion.samplers.test_sampler_loop import SAMPLERS, Elementwise, T
from tests.diffusion.samplers.test_samplers_exact import PIXELS, Gaussian, N

SEEDS = (5, 0, 17, 3)
SCHEDULES = {"straight": Straight(1000), "linear": Linear(1000), "zero": ZeroTerminalSNR(Cosine(1000))}


class Small(Elementwise):
    img_ch, img_size = 3, 8


def model(sampler):
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
    return Diffusion(Denoiser(Small(), Linear(T)), sampler=sampler, optimizer=optimizer)


def pixels():
    return torch.randint(0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def halves():
    """A mask of 8 x 8: the right half is drawn anew."""
    drawn = torch.zeros(8, 8, dtype=torch.bool)
    drawn[:, 4:] = True
    return drawn


# Times --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_walk_begins_at_its_start_and_goes_on_along_its_own_grid(grid, schedule):
    times = GRIDS[grid](schedule, 20)
    assert torch.equal(beginning_at(times, 1.0), times)
    assert beginning_at(times, 0.0).tolist() == [0]
    for start in (0.999, 0.6, 0.31, 1e-5, *times.tolist(), *(times[:-1] - 1e-12).tolist(), *(times[1:] + 1e-12)):
        left = beginning_at(times, float(start))
        assert left.dtype == torch.float64
        assert left[0] == start
        assert set(left[1:].tolist()) <= set(times.tolist())
        if start > 0:
            assert left[-1] == 0
            assert (left.diff() < 0).all()
        # One stop is passed over at most, and the first step is at least half of the grid's own to that stop.
        below = [k for k in range(21) if times[k] < start]
        assert len(below) - 1 <= len(left) - 1 <= len(below)
        if len(left) > 2:
            stop = times.tolist().index(left[1])
            assert left[0] - left[1] >= (times[stop - 1] - times[stop]) / 2


# Image-to-image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.35, 0.6003, 0.9])
@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-0.5, 0.25)])
@pytest.mark.parametrize(
    "sampler",
    [
        *(
            DDIM(400),
            DDIM(400, 1.0),
            DDPM(),
            Heun(100),
            Heun(100, grid="trailing"),
            DPMpp(200),
            DPMpp(200, grid="karras"),
        ),
        *(DPMpp(200, sde=True), DPMpp(200, sde=True, correction="heun", grid="logsnr")),
    ],
    ids=lambda sampler: f"{type(sampler).__name__}-{sampler.grid}",
)
def test_mean_and_variance_are_those_of_the_closed_form(sampler, mean, std, strength):
    # Data N(mean, std^2), an image of one value y, D^2 = alpha^2 std^2 + sigma^2 at t = strength: without noise the
    # walk keeps the quantile of x_t, with noise it draws from p(x_0 | x_t).
    schedule, y, seen = ZeroTerminalSNR(Cosine(1000)), 0.8, []
    rng = ImageRNG([1])
    edit = Edit(torch.full(PIXELS, y, dtype=torch.float64), strength)
    x, start, project = edit.begin(schedule, rng.randn(PIXELS, dtype=torch.float64))
    image = sampler(Gaussian(schedule, mean, std), x, rng, hook=seen.append, start=start, project=project)
    assert (seen[0].t, seen[-1].s) == (strength, 0)

    alpha, sigma = (level.item() for level in schedule(torch.tensor(strength, dtype=torch.float64)))
    total = alpha**2 * std**2 + sigma**2
    if getattr(sampler, "eta", 0) or getattr(sampler, "sde", False) or isinstance(sampler, DDPM):
        gain = alpha * std**2 / total
        variance = std**2 * sigma**2 / total + gain**2 * sigma**2
    else:
        gain = std / total**0.5
        variance = gain**2 * sigma**2
        eps = ImageRNG([1]).randn(PIXELS, dtype=torch.float64)
        exact = mean + gain * (alpha * (y - mean) + sigma * eps)
        assert (image - exact).square().mean().sqrt() < 0.02 * std
    expected = mean + gain * alpha * (y - mean)
    # 4 standard errors of 20000 pixels, and what the steps of these solvers leave.
    assert abs(image.mean().item() - expected) < 4 * (variance / N) ** 0.5 + 0.005 * std
    assert abs(image.var().item() / variance - 1) < 4 * (2 / N) ** 0.5 + 0.02


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("drawn", [None, halves()], ids=["whole", "mask"])
def test_strength_0_is_the_image(sampler, drawn):
    images = model(sampler).sample(None, SEEDS, edit=Edit(from_uint8(pixels()), 0.0, drawn))
    assert torch.equal(to_uint8(images), pixels().expand(4, -1, -1, -1))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_strength_1_is_what_is_drawn_without_an_image(sampler):
    made = model(sampler)
    assert made.denoiser.schedule.terminal_alpha > 0.1  # where the image would show
    assert torch.equal(made.sample(None, SEEDS, edit=Edit(from_uint8(pixels()), 1.0)), made.sample(None, SEEDS))


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("drawn", [None, halves()], ids=["whole", "mask"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_the_same_edit_in_any_batch_split_to_the_bit(sampler, drawn, strength):
    made, edit = model(sampler), Edit(from_uint8(pixels()), strength, drawn)
    together = made.sample(None, SEEDS, edit=edit)
    assert torch.pdist(together.flatten(1)).min() > 0.1
    for split in ([[seed] for seed in SEEDS], [SEEDS[::-1]]):
        for seeds in split:
            for seed, image in zip(seeds, made.sample(None, seeds, edit=edit), strict=True):
                assert torch.equal(image, together[SEEDS.index(seed)])


# Inpainting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_kept_is_the_diffused_image_in_every_step_and_exact_in_the_end(sampler, strength):
    made, drawn, seen = model(sampler), halves(), []
    image = from_uint8(pixels())
    edited = made.sample(None, SEEDS, hook=seen.append, edit=Edit(image, strength, drawn))
    noise = ImageRNG(SEEDS).randn((3, 8, 8))
    schedule = made.denoiser.schedule
    for x, time in [(seen[0].x_t, strength), *((step.x_s, step.s) for step in seen)]:
        held = diffuse(schedule, image, torch.tensor(time, dtype=torch.float64), noise)
        assert torch.equal(x[..., ~drawn], held[..., ~drawn])
        assert not (x[..., drawn] == held[..., drawn]).all() or time == strength < 1
    assert torch.equal(to_uint8(edited)[..., ~drawn], pixels()[:, ~drawn].expand(4, -1, -1))
    assert torch.equal(edited, seen[-1].x_s)
    if strength == 1:
        # This network looks at single pixels, so those that are drawn anew know nothing of the others; dynamic
        # thresholding does.
        if sampler.clip in (True, False):
            assert torch.equal(edited[..., drawn], made.sample(None, SEEDS)[..., drawn])
        assert torch.equal(seen[0].x_t[..., drawn], noise[..., drawn])


class Twins:
    """E[x_0 | x_t] when left and right half are the same N(0, 1) image, each seen under its own noise."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, t, cond=None):
        alpha, sigma = (level.view(-1, 1, 1, 1) for level in self.schedule(t))
        both = alpha / (2 * alpha**2 + sigma**2) * sum(x_t.chunk(2, 3))
        return torch.cat([both, both], 3)


@pytest.mark.parametrize(
    "sampler",
    [DDIM(50), DDPM(50), Heun(20), DPMpp(20), DPMpp(20, sde=True)],
    ids=["ddim", "ddpm", "heun", "dpmpp", "dpmpp-sde"],
)
def test_what_is_drawn_anew_follows_what_is_kept(sampler):
    schedule, rng = SCHEDULES["zero"], ImageRNG([3])
    image = ImageRNG([9]).randn((1, 40, 80), dtype=torch.float64)[0]
    drawn = torch.arange(80).expand(40, 80) >= 40
    x, start, project = Edit(image, 1.0, drawn).begin(schedule, rng.randn((1, 40, 80), dtype=torch.float64))
    left, right = sampler(Twins(schedule), x, rng, start=start, project=project).chunk(2, 3)
    assert torch.equal(left[0], image.chunk(2, 2)[0])
    assert torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1] > 0.8


def test_the_way_to_an_edited_image_can_be_shown():
    way = Trajectory()
    model(DDIM(10)).sample(None, [0, 1], hook=way, edit=Edit(from_uint8(pixels()), 0.6))
    assert len(way.pictures(2)) == 7


# Files --------------------------------------------------------------------------------------------------------------


def test_files_are_fitted_as_training_data_are(tmp_path):
    picture = torch.randint(0, 256, (30, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(picture.numpy()).save(tmp_path / "photo.png")
    mask = Image.new("L", (50, 30))
    mask.paste(255, (25, 0, 50, 30))
    mask.save(tmp_path / "mask.png")
    before = hashlib.sha256((tmp_path / "photo.png").read_bytes()).hexdigest()
    photo, mask = str(tmp_path / "photo.png"), str(tmp_path / "mask.png")
    for channels in (1, 3):
        edit = read_edit(photo, mask, None, 10, channels)
        assert torch.equal(to_uint8(edit.image), torch.tensor(decode_square(tmp_path / "photo.png", 10, channels)))
        assert torch.equal(edit.drawn, (torch.arange(10) >= 5).expand(10, 10))
        assert edit.strength == 1
    assert read_edit(photo, None, None, 10, 3).strength == 0.6
    assert read_edit(photo, mask, 0.3, 10, 3).strength == 0.3
    assert read_edit(None, None, None, 10, 3) is None
    assert hashlib.sha256((tmp_path / "photo.png").read_bytes()).hexdigest() == before


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_a_strength_that_is_no_time_is_refused(strength):
    with pytest.raises(AntherError, match="strength lies in"):
        Edit(torch.zeros(3, 8, 8), strength)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_a_strength_below_the_schedules_first_step_is_refused_and_that_step_is_drawn(sampler):
    made, image = model(sampler), from_uint8(pixels())
    for strength in (1e-9, 1e-3, 1 / T - 1e-9):
        with pytest.raises(AntherError, match=f"less than 1 / {T}, .* or 0, which gives the image back"):
            made.sample(None, SEEDS, edit=Edit(image, strength))
    images = made.sample(None, SEEDS, edit=Edit(image, 1 / T))
    assert 0 < (images - image).abs().max() < 0.1


def test_a_mask_that_leaves_nothing_to_draw_is_refused():
    with pytest.raises(AntherError, match="black all over"):
        Edit(torch.zeros(3, 8, 8), 1.0, torch.zeros(8, 8, dtype=torch.bool))
