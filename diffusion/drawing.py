"""One run of sample.py: images from a checkpoint, with the record of how each was made."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from diffusion.build import build
from diffusion.checkpoint import load_guidance, load_model
from diffusion.editing import read_edit
from diffusion.errors import AntherError
from diffusion.evaluation.subject import described
from diffusion.fabric import make_fabric
from diffusion.files import atomic, sha256
from diffusion.images import check_finite, save_gif, save_png, sheet
from diffusion.rng import check_seed
from diffusion.samplers import Sampler
from diffusion.trajectory import Trajectory


def draw(config: Mapping[str, Any], folder: Path) -> None:
    """Draws what the config asks for into the folder and says where it is.

    Args:
        config: that of conf/sample.yaml, resolved, and with the `overrides` that it was composed with.
        folder: of the run.

    Raises:
        AntherError: any fault that the user can mend.
    """
    check_seed(config["seed"])
    if (folder / "records.parquet").exists():
        raise AntherError(f"{folder} holds an evaluation and its images: choose another hydra.run.dir.")
    per_prompt, prompts = config["num_images"], config["prompts"]
    for name in ("num_images", "batch_size"):
        if config[name] < 1:
            raise AntherError(f"{name} counts images, so it is 1 or more, not {config[name]}.")
    if isinstance(prompts, str | int):
        prompts = [prompts]
    if prompts is not None and not prompts:
        raise AntherError("prompts is an empty list: name at least one, as in prompts='[a red rose]', or leave it out.")
    for prompt in prompts or ():
        if not isinstance(prompt, str | int) or not str(prompt).strip():
            raise AntherError(f"prompts holds {prompt!r}, which is no text: put quotes around it, or leave it out.")
    # One device: a few pictures; evaluate.py spreads many over several.
    fabric = make_fabric(config["trainer"], devices=1, num_nodes=1, strategy="auto")
    described_by = config["model"]
    model = load_model(config["ckpt"], None if described_by is None else described(described_by)).to(fabric.device)
    if config["gif"] and model.sampler is None:
        raise AntherError("this model draws in one call, and there is no way from noise to show: leave gif= out.")
    if model.sampler is None and any(word.lstrip("+").startswith("sampler") for word in config["overrides"]):
        raise AntherError("this model draws in one call and takes no sampler: leave sampler= out.")
    given, mask = config["image"], config["mask"]
    if given is not None and model.sampler is None:
        raise AntherError("this model draws in one call and begins at no image: leave image= out.")
    channels, side, _ = model.image_shape
    edit = read_edit(given, mask, config["strength"], side, channels)
    if edit is not None and edit.strength == 0 and config["gif"]:
        raise AntherError("strength = 0 gives the image back, and there is no way to show: leave gif= out.")
    # sample.yaml always names a sampler, for all models; one that draws in one call has no use for it.
    node = None if model.sampler is None else config["sampler"]
    sampler: Sampler | None = None if node is None else build(node, "sampler")
    texts = None if prompts is None else [str(prompt) for prompt in prompts for _ in range(per_prompt)]
    count = per_prompt if texts is None else len(texts)
    seeds = [config["seed"] + k for k in range(count)]
    weight, bad, size = config["guidance"]["weight"], config["guidance"]["bad"], config["batch_size"]
    guidance = load_guidance(config["guidance"], model)
    used = model.weight if weight is None else weight

    trajectory = Trajectory() if config["gif"] else None
    images: list[Tensor] = []
    started = time.perf_counter()
    for start in track(range(0, count, size), description="drawing"):
        rows = slice(start, start + size)
        with fabric.autocast():
            asked = None if texts is None else texts[rows]
            drawn = model.sample(asked, seeds[rows], weight, sampler, trajectory, guidance, edit)
        images.append(drawn.float().cpu())
    seconds = time.perf_counter() - started

    every = torch.cat(images)
    check_finite(every, [str(seed) for seed in seeds])
    columns = per_prompt if texts is not None and per_prompt > 1 else max(1, round(count**0.5))
    captions = texts if texts is not None else [f"seed {seed}" for seed in seeds]
    shown, below, across = list(every), list(captions), columns
    if edit is not None:
        # Each row begins with what its images were drawn from.
        for start in reversed(range(0, count, columns)):
            shown.insert(start, edit.image)
            below.insert(start, "image")
        across += 1
    _clear(folder)
    with atomic(folder / "grid.png") as temporary:
        sheet(torch.stack(shown), below, across).save(temporary, format="PNG")
    records = []
    for k, image in enumerate(every):
        name = f"images/{k:05d}.png"
        save_png(image, folder / name)
        records.append({"id": k, "prompt": texts[k] if texts else None, "seed": seeds[k], "file": name})
    protocol = {
        "ckpt": str(config["ckpt"]),
        "model": described_by,
        "sampler": node,
        "guidance_weight": used,
        **guidance.record(),
        "guidance_bad": bad,
        "guidance_bad_sha256": None if bad is None else sha256(bad),
        "image": given,
        "image_sha256": None if given is None else sha256(given),
        "strength": None if edit is None else edit.strength,
        "mask": mask,
        "mask_sha256": None if mask is None else sha256(mask),
    }
    with atomic(folder / "samples.json") as temporary:
        temporary.write_text(json.dumps({"protocol": protocol, "images": records}, indent=2) + "\n")
    if trajectory is not None:
        save_gif(trajectory.pictures(columns, scale=3), folder / "trajectory.gif")

    print(f"{count} images in {seconds:.1f} s: {folder / 'grid.png'}")
    print(f"single images {folder / 'images'}, how each was made {folder / 'samples.json'}")
    if trajectory is not None:
        print(f"from noise to image {folder / 'trajectory.gif'}")


def _clear(folder: Path) -> None:
    """Removes what another request left in the folder, whole or killed: its images would pass for these."""
    for path in (folder / "images").glob("*.png"):
        if re.fullmatch(r"\d{5}|[1-9]\d{5,}", path.stem):
            path.unlink()
    for name in ("samples.json", "trajectory.gif"):
        (folder / name).unlink(missing_ok=True)
