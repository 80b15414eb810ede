"""A small training and a small evaluation, and all of what they leave that an interruption must not change."""

import csv
import json
from pathlib import Path
from typing import Any

import torch

TRAIN = [
    "experiment=demo",
    "data.size=16",
    "data.n_train=80",
    "data.n_val=16",
    "data.batch_size=8",
    "network.down_chs=[32,32,32]",
    "network.img_size=16",
    "module.val_times=1",
    "trainer.accelerator=cpu",
    "trainer.max_steps=20",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=1",
    "scheduler.warmup_steps=3",
    "callbacks=default",
    "callbacks.samples=null",
    "callbacks.last.every_n_steps=1",
    "callbacks.last.share=1.0",
]
EVALUATE = [
    "prompts=[a red rose,two white daisies,a yellow sunflower]",
    "num_images=14",
    "sampler=ddim",
    "sampler.steps=2",
    "batch_size=2",
    "clip.model=anther-flowers-32",
    "clip.pretrained=embedded",
    "nearest.space=pixels",
    "inception=null",
    "dataset=null",
    "trainer.accelerator=cpu",
]
TIMES = {"epoch_seconds", "images_per_second"}


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first place where two nested values differ, tensors to the bit; None where they do not."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return None if same else where
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(map(str, one.keys() ^ other.keys()))}"
        return next((d for key in one if (d := difference(one[key], other[key], f"{where}/{key}"))), None)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return f"{where}: {len(one)} and {len(other)}"
        pairs = enumerate(zip(one, other, strict=True))
        return next((d for k, (a, b) in pairs if (d := difference(a, b, f"{where}/{k}"))), None)
    return None if one == other else f"{where}: {one!r} and {other!r}"


def log(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that say how long something took."""
    with (folder / "logs" / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def trained(folder: Path) -> dict[str, Any]:
    """All that a training leaves and that must not depend on interruptions."""
    checkpoints = {path.name: path for path in (folder / "checkpoints").iterdir()}
    found: dict[str, Any] = {"files": files(folder), "log": log(folder)}
    for name in sorted(set(checkpoints) - {"previous.ckpt"}):
        content = torch.load(checkpoints[name], map_location="cpu", weights_only=True)
        # Where the run lies is another folder; the loops count what they began, too, and are proven by all the rest.
        content.pop("config")
        content.pop("loops")
        content["callbacks"] = {key: relative(state, folder) for key, state in content["callbacks"].items()}
        found[name] = content
    for name in ("result.json", "splits.json"):
        found[name] = json.loads((folder / name).read_text())
    found["result.json"].pop("seconds")
    # When it saves is a matter of the callbacks, and may be another in the run that is stopped.
    found["result.json"].pop("limits_sha256")
    return found


def relative(value: Any, folder: Path) -> Any:
    """The same with paths as they are seen from the run's folder."""
    if isinstance(value, str):
        return value.replace(str(folder), "")
    if isinstance(value, dict):
        return {relative(key, folder): relative(entry, folder) for key, entry in value.items()}
    return value


def evaluated(folder: Path) -> dict[str, Any]:
    """All that an evaluation leaves and that must not depend on interruptions."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for fact in ("made", "seconds"):
        metrics["run"].pop(fact)
    found: dict[str, Any] = {"files": files(folder), "metrics": metrics}
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".png", ".npy", ".csv", ".parquet") or path.name == "protocol.json":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def files(folder: Path) -> list[str]:
    """Every file of a run but Hydra's, by its path in the folder; hidden ones, too."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.startswith(".hydra/") and not name.endswith(".log"))
