"""Pictures of what diffusion does.

python -m diffusion.pictures schedules [NAME ...] [--T 100 200 400 1000]
python -m diffusion.pictures forward IMAGE ... [--schedule cosine] [--T 1000]
python -m diffusion.pictures denoise CHECKPOINT
python -m diffusion.pictures reverse CHECKPOINT [--prompts 'a red rose' ...]
python -m diffusion.pictures attention CHECKPOINT
python -m diffusion.pictures progress RUN
"""

import argparse
import csv
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion import cli
from diffusion.errors import AntherError
from diffusion.files import atomic

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from diffusion.modules.diffusion import Diffusion
    from diffusion.samplers import Sampler
    from diffusion.schedules import Schedule

CONF = Path(__file__).parents[1] / "conf"
TIMES = [0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0]


def make_schedule(name: str, T: int) -> "Schedule":
    """The noise schedule that `schedule=NAME T=...` means to train.py.

    Raises:
        AntherError: no such schedule, or an impossible T.
    """
    if T < 2:
        raise AntherError(f"T = {T} counts the steps of a schedule: 2 or more.")
    schedule: Schedule = _part("train", "schedule", name, f"T={T}")
    return schedule


def make_sampler(name: str, steps: int | None) -> "Sampler":
    """The sampler that `sampler=NAME sampler.steps=...` means to sample.py; None leaves the steps at its own number.

    Raises:
        AntherError: no such sampler, or an impossible number of steps.
    """
    overrides = [] if steps is None else [f"sampler.steps={steps}"]
    sampler: Sampler = _part("sample", "sampler", name, *overrides)
    return sampler


def _known(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _part(command: str, group: str, name: str, *overrides: str) -> Any:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from diffusion.build import build

    if name not in _known(group):
        raise AntherError(f"there is no {group} {name!r}: choose from {', '.join(_known(group))}.")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose(command, [f"{group}={name}", *overrides])[group]
        return build(OmegaConf.to_container(node, resolve=True), group)  # type: ignore[arg-type]


def schedules(chosen: Namespace) -> None:
    """Beta, alpha-bar, SNR and terminal SNR of every schedule at every T: a figure, and a table."""
    from rich.console import Console
    from rich.table import Table

    from diffusion.evaluation.plots import number, save, styled
    from diffusion.visualise import ScheduleRow, draw_schedules, schedule_row

    made = {(name, T): make_schedule(name, T) for name in chosen.names for T in chosen.T}
    rows = [schedule_row(name, schedule) for (name, _), schedule in made.items()]
    with atomic(chosen.out / "schedules.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ScheduleRow._fields)
        writer.writerows(rows)
    with styled():
        save(draw_schedules(made), chosen.out / "schedules.png")
    table = Table(*(field.replace("_", " ") for field in ScheduleRow._fields), box=None, header_style="bold")
    for row in rows:
        table.add_row(*(number(value) if isinstance(value, float) else str(value) for value in row))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no edge
    console.print(table)
    print(f"table        {chosen.out / 'schedules.csv'}")
    print(f"picture      {chosen.out / 'schedules.png'}")


def forward(chosen: Namespace) -> None:
    """Images, noisier and noisier."""
    import torch

    from datamodules.folders import decode_square
    from diffusion.images import from_uint8
    from diffusion.visualise import forward_strip

    if chosen.size < 1:
        raise AntherError(f"--size {chosen.size} counts pixels: 1 or more.")
    pixels = []
    for path in chosen.images:
        try:
            pixels.append(torch.from_numpy(decode_square(path, chosen.size, 3)))
        except MemoryError:
            raise
        # What Pillow raises for damaged files depends on the format.
        except Exception as error:
            raise AntherError(f"{path} cannot be read as an image ({error}): give image files.") from error
    schedule = make_schedule(chosen.schedule, chosen.T)
    _write(forward_strip(from_uint8(torch.stack(pixels)), schedule, chosen.t, chosen.seed).picture(), chosen, "forward")


def denoise(chosen: Namespace) -> None:
    """What the model sees in noisy validation images."""
    from diffusion.visualise import denoising_strip

    model, images, cond = _model_and_images(chosen)
    _write(denoising_strip(model, images, cond, chosen.t, chosen.seed).picture(), chosen, "denoise")


def reverse(chosen: Namespace) -> None:
    """The way from noise to image."""
    from diffusion.build import rebuild
    from diffusion.visualise import reverse_strip

    model = _model(chosen)
    prompts = chosen.prompts
    seeds = [chosen.seed + k for k in range(len(prompts) if prompts else chosen.n)]
    if chosen.sampler is not None:
        sampler = make_sampler(chosen.sampler, chosen.steps)
    elif chosen.steps is not None:
        sampler = rebuild({**model.config["module"]["sampler"], "steps": chosen.steps}, "sampler")
    else:
        sampler = model.sampler
    strip = reverse_strip(model, prompts, seeds, chosen.weight, sampler, chosen.frames)
    _write(strip.picture(), chosen, "reverse")


def attention(chosen: Namespace) -> None:
    """Where the attention layers look."""
    from diffusion.visualise import attention_strip

    model, images, cond = _model_and_images(chosen)
    strip = attention_strip(model, images, cond, chosen.t, tuple(chosen.at), chosen.seed)
    _write(strip.picture(), chosen, "attention")


def progress(chosen: Namespace) -> None:
    """What a run drew as it was trained."""
    from diffusion.visualise import progress_picture

    _write(progress_picture(chosen.run), chosen, "progress")


def _model(chosen: Namespace) -> "Diffusion":
    from diffusion.evaluation.subject import load_subject
    from diffusion.modules.diffusion import Diffusion

    model = load_subject(chosen.checkpoint).model
    if not isinstance(model, Diffusion):
        raise AntherError(
            f"{chosen.checkpoint} holds a {type(model).__name__}, which has no steps: give a diffusion checkpoint."
        )
    return model


def _model_and_images(chosen: Namespace) -> "tuple[Diffusion, Tensor, Tensor | None]":
    """The model, and the first validation images of its data with their conditions."""
    from diffusion.evaluation.subject import load_data
    from diffusion.modules.diffusion import ClassifierFreeDiffusion

    if chosen.n < 1:
        raise AntherError(f"-n {chosen.n} counts images: 1 or more.")
    model = _model(chosen)
    data = load_data(model.config, path=chosen.data)
    if isinstance(model, ClassifierFreeDiffusion):
        model.conditioner.prepare(data.table)
    batch = next(iter(data.val_dataloader()))
    batch = {name: rows[: chosen.n] for name, rows in batch.items()}
    return model, batch["image"], model.validation_condition(batch)


def _write(picture: "Image.Image", chosen: Namespace, name: str) -> None:
    path = chosen.out / f"{name}.png"
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")
    print(f"picture      {path}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m diffusion.pictures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="WHAT")

    def command(what: Any) -> argparse.ArgumentParser:
        one = commands.add_parser(what.__name__, help=what.__doc__, description=what.__doc__)
        one.set_defaults(do=what)
        one.add_argument("--out", type=Path, default=Path("pictures"), help="folder of the picture (pictures)")
        return one

    def of_model(one: argparse.ArgumentParser, images: bool) -> None:
        one.add_argument("checkpoint", type=Path, help="of train.py")
        one.add_argument("-n", type=int, default=4, help="images (4)")
        one.add_argument("--seed", type=int, default=0, help="of the noise (0)")
        if images:
            one.add_argument("--data", metavar="PATH", help="where the model's data lie on this machine")

    one = command(schedules)
    names = ["linear", "quadratic", "cosine", "sigmoid", "zero_terminal_snr"]
    one.add_argument("names", nargs="*", default=names, help=f"as in schedule=NAME ({' '.join(names)})")
    one.add_argument("--T", type=int, nargs="+", default=[100, 200, 400, 1000], help="steps (100 200 400 1000)")
    one = command(forward)
    one.add_argument("images", nargs="+", type=Path, help="image files")
    one.add_argument("--schedule", default="linear", help="as in schedule=NAME (linear)")
    one.add_argument("--T", type=int, default=1000, help="steps (1000)")
    one.add_argument("--t", type=float, nargs="+", default=TIMES, help="times in [0, 1], a column each")
    one.add_argument("--size", type=int, default=64, help="pixels (64)")
    one.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    one = command(denoise)
    of_model(one, images=True)
    one.add_argument("--t", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="times (0.1 0.5 0.9)")
    one = command(reverse)
    of_model(one, images=False)
    one.add_argument("--prompts", nargs="+", help="one image each, for a model with a condition")
    one.add_argument("--weight", type=float, help="guidance weight w; the model's own if left out")
    words = f"as in sampler=NAME ({' '.join(_known('sampler'))}); the model's own if left out"
    one.add_argument("--sampler", help=words)
    one.add_argument("--steps", type=int, help="of the sampler; its own number if left out")
    one.add_argument("--frames", type=int, default=9, help="columns (9)")
    one = command(attention)
    of_model(one, images=True)
    one.add_argument("--t", type=float, default=0.3, help="time at which the model sees the images (0.3)")
    one.add_argument("--at", type=float, nargs=2, default=[0.5, 0.5], metavar=("X", "Y"), help="from where (0.5 0.5)")
    one = command(progress)
    one.add_argument("run", type=Path, help="folder of a run of train.py")
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        AntherError: any fault that the user can mend.
    """
    chosen = parser().parse_args(arguments)
    chosen.do(chosen)


if __name__ == "__main__":
    cli.run(main)
