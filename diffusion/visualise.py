"""What diffusion does to images, as pictures: the content of `python -m diffusion.pictures`."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.images import sheet
from diffusion.modules.diffusion import Diffusion
from diffusion.networks.attention import attention_maps
from diffusion.rng import generator
from diffusion.samplers import Sampler, Step
from diffusion.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

NOISE_SHOWN = 1 / 3
"""Noise is shown times this, so that three deviations span the range of an image."""

LINES = ("#7fb8e6", "#fdb055", "#6fcf80", "#d1342f", "#2b1a66", "#8c564b", "#0b8a8a", "#000000")
"""Colours of schedules, light ones first."""


class Strip(NamedTuple):
    """Images with captions, row by row.

    Attributes:
        images: (N, C, H, W), shown clamped to [-1, 1].
        captions: N.
        columns: images per row.
    """

    images: Tensor
    captions: list[str]
    columns: int

    def picture(self) -> "Image.Image":
        """The strip as one picture; small images are magnified by repetition of pixels."""
        scale = max(1, 128 // self.images.shape[-1])
        return sheet(self.images.float().cpu().clamp(-1, 1), self.captions, self.columns, scale)


def decibel(ratio: float) -> str:
    """A ratio of powers in dB, in words where it has none."""
    if ratio <= 0:
        return "no signal"
    return "no noise" if math.isinf(ratio) else f"{10 * math.log10(ratio):.1f} dB"


# Images ---------------------------------------------------------------------------------------------------------------


def check_times(times: Sequence[float], least: float = 0.0) -> Tensor:
    """Times as a tensor, float64.

    Raises:
        AntherError: none, or one outside [least, 1].
    """
    if not times or not all(least <= t <= 1 for t in times):
        raise AntherError(f"times lie in [{least:g}, 1], and {', '.join(map(str, times)) or 'none'} was given.")
    return torch.tensor(list(times), dtype=torch.float64)


def noise_like(images: Tensor, seed: int) -> Tensor:
    """Standard normal noise; that of image k is a function of seed and k."""
    draws = [torch.randn(image.shape, generator=generator(seed, k)) for k, image in enumerate(images)]
    return torch.stack(draws).to(images)


def forward_strip(images: Tensor, schedule: Schedule, times: Sequence[float], seed: int = 0) -> Strip:
    """The forward process: x_t = alpha_t x_0 + sigma_t eps, a row per image and a column per time, with one eps a row.

    Args:
        images: x_0, (N, C, H, W) in [-1, 1].
        schedule: signal and noise levels.
        times: in [0, 1].
        seed: of the noise.
    """
    t = check_times(times)
    alpha, sigma = (level.to(images).view(-1, 1, 1, 1) for level in schedule(t))
    snr = schedule.snr(t).tolist()
    rows = [alpha * x_0 + sigma * eps for x_0, eps in zip(images, noise_like(images, seed), strict=True)]
    captions = [f"t = {time:g}, {decibel(ratio)}" for time, ratio in zip(times, snr, strict=True)]
    return Strip(torch.cat(rows), captions * len(images), len(times))


@torch.no_grad()
def denoising_strip(model: Diffusion, images: Tensor, cond: Tensor | None, times: Sequence[float], seed: int) -> Strip:
    """What the model makes of noisy images: rows of x_0, x_t, the noise, the noise it sees, and the x_0 it expects.

    Args:
        model: in evaluation mode.
        images: x_0, (N, C, H, W) in [-1, 1], on the model's device.
        cond: conditions (N, D), or None.
        times: in (0, 1]; a row per image and time.
        seed: of the noise.
    """
    check_times(times, least=1 / model.T)
    denoiser, eps, n = model.denoiser, noise_like(images, seed), len(images)
    by_time = []
    for time in times:
        t = torch.full((n,), time, dtype=torch.float64, device=images.device)
        alpha, sigma = denoiser.levels(t, images)
        x_t = alpha * images + sigma * eps
        expected = denoiser(x_t, t, cond)
        seen = (x_t - alpha * expected) / sigma
        by_time.append(torch.stack([images, x_t, NOISE_SHOWN * eps, NOISE_SHOWN * seen, expected], 1))
    rows = torch.stack(by_time, 1)  # (n, times, 5, C, H, W)
    captions = [
        caption
        for time in times
        for caption in ("x_0", f"x_t at t = {time:g}", "its noise", "predicted noise", "expected x_0")
    ]
    return Strip(rows.flatten(0, 2), captions * n, 5)


def reverse_strip(
    model: Diffusion,
    prompts: Sequence[str] | None,
    seeds: Sequence[int],
    weight: float | None,
    sampler: Sampler | None,
    frames: int,
) -> Strip:
    """The reverse process: for each image a row of x_t, and below it a row of the x_0 that is expected from it.

    Args:
        model: in evaluation mode.
        prompts: see `Generator.sample`.
        seeds: see `Generator.sample`.
        weight: see `Generator.sample`.
        sampler: see `Generator.sample`.
        frames: columns, evenly spaced over the steps; the last is the finished image.
    """
    if frames < 2:
        raise AntherError(f"frames = {frames} must be 2 or more: the first step and the finished image.")
    kept: dict[int, tuple[float, Tensor, Tensor]] = {}

    def keep(step: Step) -> None:
        wanted = {round(k * step.steps / (frames - 1)) for k in range(frames - 1)}
        if step.number in wanted:
            kept[step.number] = step.t, step.x_t.cpu(), step.x_0.cpu()
        if step.number == step.steps - 1:
            kept[step.steps] = step.s, step.x_s.cpu(), step.x_s.cpu()

    model.sample(prompts, seeds, weight, sampler, keep)
    columns = list(kept.values())
    rows, captions = [], []
    for k in range(len(seeds)):
        rows += [noisy[k] for _, noisy, _ in columns] + [clean[k] for *_, clean in columns]
        captions += [f"x_t, t = {t:.3g}" for t, *_ in columns] + [f"expected x_0, t = {t:.3g}" for t, *_ in columns]
    return Strip(torch.stack(rows), captions, len(columns))


@torch.no_grad()
def attention_strip(
    model: Diffusion, images: Tensor, cond: Tensor | None, time: float, at: tuple[float, float], seed: int
) -> Strip:
    """Where each attention layer looks from one place of the image, mean of its heads, as heat over the image.

    Args:
        model: in evaluation mode.
        images: x_0, (N, 3, H, W) in [-1, 1], on the model's device; the model sees them at `time`.
        cond: conditions (N, D), or None.
        time: in (0, 1].
        at: the place, across and down, in [0, 1).
        seed: of the noise.

    Raises:
        AntherError: the network has no attention, or a place outside the image.
    """
    check_times([time], least=1 / model.T)
    if not all(0 <= share < 1 for share in at):
        raise AntherError(f"the place {at} lies outside the image: give shares of width and height in [0, 1).")
    t = torch.full((len(images),), time, dtype=torch.float64, device=images.device)
    x_t = model.denoiser.diffuse(images, t, noise_like(images, seed))
    with attention_maps(model.trained) as maps:
        model.denoiser(x_t, t, cond)
    if not maps:
        raise AntherError(
            f"{type(model.trained).__name__} has no attention as it is configured, so there is nothing to show."
        )
    height, width = images.shape[2:]
    columns, captions = [images.cpu(), x_t.cpu()], ["x_0", f"x_t at t = {time:g}"]
    for name, weights in maps.items():
        pixels = weights.shape[-1]
        h = round(math.sqrt(pixels * height / width))
        w = pixels // h
        query = int(at[1] * h) * w + int(at[0] * w)
        heat = weights[:, :, query].mean(1).reshape(-1, 1, h, w).cpu()
        heat = torch.nn.functional.interpolate(heat / heat.amax((2, 3), keepdim=True), (height, width), mode="nearest")
        columns.append(heated(images.cpu(), heat))
        captions.append(f"{name}, {h} x {w}")
    return Strip(torch.stack(columns, 1).flatten(0, 1), captions * len(images), len(columns))


def heated(images: Tensor, heat: Tensor) -> Tensor:
    """Images (N, C, H, W) in grey, with heat (N, 1, H, W) in [0, 1] as colour over them: (N, 3, H, W)."""
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps["inferno"](heat[:, 0].numpy())[..., :3]).permute(0, 3, 1, 2).float() * 2 - 1
    return 0.4 * images.float().mean(1, keepdim=True) + 0.6 * colours


def progress_picture(run: Path, most: int = 10) -> "Image.Image":
    """The pictures that a run drew as it was trained, one below the other, evenly chosen.

    Args:
        run: its folder.
        most: how many at most; the first and the last are among them.

    Raises:
        AntherError: it has none.
    """
    from PIL import Image, ImageDraw, ImageFont

    # By number: as text, a million comes before two hundred thousand.
    steps = {path: int(path.stem.rpartition("-")[2]) for path in (run / "samples").glob("step-*.png")}
    paths = sorted(steps, key=steps.__getitem__)
    if not paths:
        raise AntherError(f"there are no pictures in {run / 'samples'}: give the folder of a run of train.py.")
    count = min(most, len(paths))
    chosen = [paths[round(k * (len(paths) - 1) / max(1, count - 1))] for k in range(count)]
    pictures: list[Image.Image] = []
    for path in chosen:
        with Image.open(path) as file:
            pictures.append(file.convert("RGB"))
    line = 22
    width = max(picture.width for picture in pictures)
    page = Image.new("RGB", (width, sum(picture.height + line for picture in pictures)), "white")
    draw, top = ImageDraw.Draw(page), 0
    for path, picture in zip(chosen, pictures, strict=True):
        record = path.with_suffix(".json")
        epoch = json.loads(record.read_text())["epoch"] if record.exists() else None
        text = f"step {steps[path]:,}" + ("" if epoch is None else f", epoch {epoch}")
        draw.text((6, top + 3), text, fill="black", font=ImageFont.load_default(size=14))
        page.paste(picture, (0, top + line))
        top += picture.height + line
    return page


# Schedules ------------------------------------------------------------------------------------------------------------


class ScheduleRow(NamedTuple):
    """What a schedule does, in numbers.

    Attributes:
        name: of the schedule.
        T: steps.
        beta_first: beta of the first step, 1 - alpha_1^2 / alpha_0^2; NaN where signal does not shrink by a beta.
        beta_last: of the last.
        alpha_bar_half: alpha_t^2 at t = 1/2.
        snr_half: signal-to-noise ratio there.
        terminal_alpha: alpha_1: the share of the signal that is left in the noisiest image.
        terminal_snr: signal-to-noise ratio there.
        crossing: t where signal and noise are equal.
    """

    name: str
    T: int
    beta_first: float
    beta_last: float
    alpha_bar_half: float
    snr_half: float
    terminal_alpha: float
    terminal_snr: float
    crossing: float


def schedule_row(name: str, schedule: Schedule) -> ScheduleRow:
    """The row of a schedule."""
    betas = step_betas(schedule)
    t = torch.linspace(0, 1, 10001, dtype=torch.float64)
    half, last = torch.tensor([0.5, 1.0], dtype=torch.float64)
    crossing = t[(schedule.snr(t) <= 1).nonzero()]
    return ScheduleRow(
        name=name,
        T=schedule.T,
        beta_first=float(betas[0]),
        beta_last=float(betas[-1]),
        alpha_bar_half=float(schedule(half)[0] ** 2),
        snr_half=float(schedule.snr(half)),
        terminal_alpha=schedule.terminal_alpha,
        terminal_snr=float(schedule.snr(last)),
        crossing=float(crossing[0]) if len(crossing) else math.nan,
    )


def step_betas(schedule: Schedule) -> Tensor:
    """beta_k = 1 - (alpha_k / alpha_{k-1})^2 of the T steps, float64 (T,)."""
    alpha, _ = schedule(torch.arange(schedule.T + 1, dtype=torch.float64) / schedule.T)
    return 1 - (alpha[1:] / alpha[:-1]) ** 2


def draw_schedules(schedules: Mapping[tuple[str, int], Schedule]) -> "Figure":
    """Beta, alpha-bar and SNR over time, and the terminal SNR over T: a colour per name, a line style per T.

    Args:
        schedules: by name and T.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from diffusion.evaluation.plots import DPI

    figure = Figure(figsize=(12, 8), dpi=DPI, layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, 2).flat)
    names, steps = (list(dict.fromkeys(part)) for part in zip(*schedules, strict=True))
    # Some lie on others: the first are the widest, and what lies on them is darker, so that every one can be seen.
    colours = dict(zip(names, cycle(LINES), strict=False))
    widths = {name: 1.2 + (len(names) - 1 - k) for k, name in enumerate(names)}
    styles = dict(zip(steps, ["-", "--", ":", "-."] * len(steps), strict=False))
    for (name, T), schedule in schedules.items():
        t = torch.arange(T + 1, dtype=torch.float64) / T
        alpha, _ = schedule(t)
        look = {"color": colours[name], "ls": styles[T], "lw": widths[name]}
        panels[0].plot(t[1:], step_betas(schedule), **look)
        panels[1].plot(t, alpha**2, **look)
        panels[2].plot(t[1:], schedule.snr(t)[1:], **look)
    floor = 1e-10  # the cosine of 1000 steps ends at 2.4e-9
    for name in names:
        ends = [(T, max(float(s.snr(torch.ones(()))), floor)) for (other, T), s in schedules.items() if other == name]
        panels[3].plot(
            *zip(*sorted(ends), strict=True),
            color=colours[name],
            marker="o",
            lw=widths[name],
            ms=4 + widths[name],
            label=name,
        )
    panels[0].set(title="beta of each step", xlabel="t", yscale="log")
    panels[1].set(title="alpha-bar: share of the signal's variance", xlabel="t")
    panels[2].set(title="signal-to-noise ratio", xlabel="t", yscale="log", ylim=(floor, None))
    panels[2].axhline(1, color="#8a8a8a", lw=0.8)
    panels[3].set(title=f"SNR at t = 1 (an SNR of 0 is drawn at {floor:g})", xlabel="T", xscale="log", yscale="log")
    panels[3].set_xticks(steps, [str(T) for T in steps])
    panels[3].minorticks_off()
    for axes in (panels[0], panels[2], panels[3]):
        axes.yaxis.set_major_formatter("{x:g}")
    of_steps = [Line2D([], [], color="black", ls=styles[T], label=f"T = {T}") for T in steps]
    panels[1].legend(handles=of_steps, fontsize=8)
    panels[3].legend(fontsize=8)
    return figure
