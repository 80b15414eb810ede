"""Loggers: a CSV file that survives resuming, W&B with or without an account, and pictures for those that hold them."""

import contextlib
import csv
import netrc
import os
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from diffusion.files import atomic

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger

FLUSH_SECONDS = 2.0  # between two looks at the log file from outside, at least
FLUSH_SHARE = 20  # and this many times as long as the last writing took, which grows with the run
REACH_SECONDS = 10.0  # for the first answer of W&B's server
FINISH_SECONDS = 300.0  # for the last of it


class CSVLog(Logger):
    """All metrics in one file: a row per step, a column per metric, `step` first.

    A resumed run goes on in the same file: rows from its first step on are those of the run that was killed, and are
    replaced. Lightning's CSVLogger deletes the file instead. `LastCheckpoint` keeps file and checkpoint in step.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self._rows: dict[int, dict[str, Any]] = {}
        self._begun = False
        self._written = 0.0
        self._took = 0.0

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def version(self) -> str:
        """There is one version: the folder of the run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The file's folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run's folder holds its config already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds values to the row of a step."""
        step = max(self._rows, default=0) if step is None else step
        if not self._begun:
            self._rows = {at: row for at, row in self._read().items() if at <= step}
            self._begun = True
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        self._rows.setdefault(step, {}).update(values)
        self.save()

    @rank_zero_only
    def cut(self, step: int) -> None:
        """Goes on in the file with this step: removes its row and those after it."""
        self._rows = {at: row for at, row in self._read().items() if at < step}
        self._begun = True

    @rank_zero_only
    def save(self) -> None:
        """Writes the file, unless that was done a moment ago."""
        if time.monotonic() - self._written > max(FLUSH_SECONDS, FLUSH_SHARE * self._took):
            self._write()

    @rank_zero_only
    def flush(self) -> None:
        """Writes the file now."""
        self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Writes the file."""
        self._write()

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self.path.exists():
            return {}
        with self.path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {int(row["step"]): {k: v for k, v in row.items() if k != "step" and v != ""} for row in rows}

    def _write(self) -> None:
        if not self._rows:
            return
        began = time.monotonic()
        columns = ["step", *sorted({name for row in self._rows.values() for name in row})]
        with atomic(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows({"step": step, **row} for step, row in sorted(self._rows.items()))
        self._written = time.monotonic()
        self._took = self._written - began


def wandb_logger(
    project: str,
    save_dir: str | Path,
    name: str | None = None,
    log_model: bool | Literal["all"] = False,
    **options: Any,
) -> "WandbLogger":
    """A W&B logger; without an account it records the run on disk and says so.

    An account is the variable WANDB_API_KEY or an entry for W&B's host in the netrc file, as `wandb login` makes it;
    WANDB_MODE overrules. A server that does not answer is no reason to stop: the run is recorded on disk too, and one
    that goes away later is waited for at the end, FINISH_SECONDS at most. A run's id is kept beside its files, so a
    resumed run goes on under the same id. What it logged after its last checkpoint stands there twice: W&B has no way
    to take rows back but on its own server.

    Args:
        project: W&B project.
        save_dir: the run's log folder; W&B makes `wandb/` in it.
        name: of the run; None takes the name of the run's folder.
        log_model: whether the checkpoints that are the best by some measure become model artifacts: True at the end
            those that are the best then, "all" each when it is written. An offline run names True's in the run's
            folder, where `wandb sync` finds them, and holds copies of "all", of which the folder keeps only the last.
        **options: of `WandbLogger` and `wandb.init`, e.g. `checkpoint_name`, `entity`, `group`, `tags`.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    folder = Path(save_dir)
    mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_account() else "offline")
    reason = "" if has_wandb_account() else ", for no account was found"
    if mode == "online" and (fault := _unreachable(_wandb_url())) is not None:
        mode, reason = "offline", f", for {_wandb_url()} cannot be reached ({fault})"
    if mode == "offline":
        rank_zero_only(print)(
            f"W&B: recording offline under {folder / 'wandb'}{reason}; `wandb sync` on its folder uploads the run "
            "later."
        )
    options = {"settings": wandb.Settings(finish_timeout=FINISH_SECONDS), **options}
    options = {"mode": mode, "id": _run_id(folder), **options}
    options = {"add_file_policy": "mutable" if log_model == "all" else "immutable", **options}
    name = name or folder.absolute().parent.name
    return WandbLogger(project=project, save_dir=folder, name=name, log_model=log_model, **options)


def _wandb_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


@rank_zero_only
def _unreachable(url: str) -> str | None:
    """Why nothing answers at an address, or None."""
    try:
        with urlopen(Request(url, method="HEAD"), timeout=REACH_SECONDS):
            return None
    except HTTPError:
        return None  # whatever the server says, it is there
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def has_wandb_account() -> bool:
    """Whether W&B would find a key, without asking its server or looking at the key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(_wandb_url()).hostname or ""
    home = Path.home()
    for path in [os.environ.get("NETRC"), home / ".netrc", home / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if path and netrc.netrc(path).authenticators(host):
                return True
    return False


@rank_zero_only
def _run_id(folder: Path) -> str:
    from wandb.sdk.lib.runid import generate_id

    path = folder / "wandb_id"
    if not path.exists():
        with atomic(path) as temporary:
            temporary.write_text(generate_id())
    return path.read_text()


@rank_zero_only
def log_picture(loggers: Sequence[Logger], key: str, path: Path, step: int) -> None:
    """Shows a PNG file to the loggers that hold pictures: W&B and TensorBoard.

    Args:
        loggers: of the trainer.
        key: the picture's name.
        path: the file.
        step: optimizer steps so far.
    """
    for logger in loggers:
        match type(logger).__name__:
            case "WandbLogger":
                logger.log_image(key, [str(path)], step=step)  # type: ignore[attr-defined]
            case "TensorBoardLogger":
                import numpy as np
                from PIL import Image

                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
                experiment: Any = logger.experiment  # type: ignore[attr-defined]
                experiment.add_image(key, pixels, step, dataformats="HWC")


@rank_zero_only
def log_table(loggers: Sequence[Logger], key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
    """Gives W&B a table; cells that are PIL images are shown as pictures."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            import wandb
            from PIL.Image import Image

            data = [[wandb.Image(cell) if isinstance(cell, Image) else cell for cell in row] for row in rows]
            logger.log_table(key, columns=columns, data=data, step=step)  # type: ignore[attr-defined]


def finish(loggers: Sequence[Logger]) -> None:
    """Closes W&B's run, so that the next job of a sweep in this process gets one of its own."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger":
            logger.experiment.finish()  # type: ignore[attr-defined]
