"""One run of train.py: build the parts, say what will happen, fit, and say where everything is."""

import json
import logging
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from callbacks.measure import Measure
from diffusion import checkpoint
from diffusion.build import build
from diffusion.cli import write_result
from diffusion.errors import AntherError
from diffusion.fabric import set_precision
from diffusion.files import atomic, sha256
from diffusion.loggers import finish
from diffusion.loss_curve import draw_losses
from diffusion.modules.generator import Generator
from diffusion.modules.learning_rate import retune
from diffusion.ranks import is_lost
from diffusion.rng import check_seed


def train(config: dict[str, Any], folder: Path) -> float | None:
    """Trains what the config describes, going on from the folder's last checkpoint if there is one.

    Args:
        config: resolved, plain.
        folder: of the run.

    Returns:
        The metric named `objective`, of the weights at the end; None where it needs a validation and there is none.

    Raises:
        AntherError: any fault that the user can mend.
    """
    # Its device list and its advertisements, and what it does with torch's insides; other warnings stay.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=DeprecationWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    check_seed(config["seed"])
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    resume, before = _resume_from(folder, config)
    own = resume is not None and resume.parent == folder / "checkpoints"
    began = before.get("ckpt") if own or resume is None else str(resume.absolute())
    # Every checkpoint of a run holds what the run began from, whatever the command said that went on with it.
    config = {**config, "ckpt": began}
    datamodule = build(config["data"], "data")
    module = build(config["module"], "module")
    # Paths in the config are seen from here.
    module.config = {**config, "working_directory": str(Path.cwd())}
    trainer = build(
        config["trainer"],
        "trainer",
        callbacks=[*_parts(config, "callbacks"), _Retune()],
        logger=_parts(config, "logger"),
    )
    # With `deterministic` torch fills new memory with NaN, to show who reads it before writing: a trial run will do.
    torch.utils.deterministic.fill_uninitialized_memory = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    set_precision(trainer.precision)
    if trainer.accumulate_grad_batches < 1:
        raise AntherError("trainer.accumulate_grad_batches counts the batches of a step: give 1 or more.")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise AntherError(
            "trainer.check_val_every_n_epoch counts epochs: give 1 or more, or null beside a "
            "trainer.val_check_interval in steps; trainer.limit_val_batches=0 leaves the validation out."
        )
    if not trainer.limit_train_batches:
        raise AntherError("trainer.limit_train_batches=0 leaves nothing to train: give a number of batches, or 1.0.")
    datamodule.prepare_data()
    datamodule.setup("fit")
    if not trainer.fast_dev_run:
        _same_data(datamodule, module, config, folder, trainer, own)
        if own:
            checkpoint.check_goes_on(before, config, folder)
    _announce(config, datamodule, module, trainer, resume, folder)
    started = time.monotonic()
    with _as_sentences():
        trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True)
        if trainer.fast_dev_run:
            return 0.0
        objective = _objective(trainer, module, datamodule, config["objective"])
    finish(trainer.loggers)
    if trainer.is_global_zero:
        if (log := folder / "logs" / "metrics.csv").exists():
            draw_losses(log, folder / "plots" / "loss.png")
        count = sum(p.numel() for p in module.parameters())
        made = trainer.global_step, trainer.current_epoch
        write_result(folder, config, objective, *made, count, time.monotonic() - started)
    _farewell(config, module, objective, folder)
    return objective


@contextmanager
def _as_sentences() -> Iterator[None]:
    """Makes a sentence of what Lightning itself refuses, once it gets there; what it only called keeps its trace."""
    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith("lightning.") or is_lost(error):
            raise
        raise AntherError(f"{' '.join(str(error).split())} (Lightning, of trainer.* and callbacks.*)") from error


def _parts(config: Mapping[str, Any], group: str) -> list[Any]:
    """The parts of a group; what an experiment says of a part that the chosen group does not have is left aside."""
    nodes = (config.get(group) or {}).items()
    return [build(node, f"{group}.{name}") for name, node in nodes if node and "_target_" in node]


def _resume_from(folder: Path, config: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
    """The run's own last checkpoint, else the one that `ckpt` names, else None; and the config in it.

    Raises:
        AntherError: the checkpoint is of another model, `ckpt` is not what the folder's run began from, or it leaves
            nothing to train.
    """
    last = folder / "checkpoints" / checkpoint.LAST
    asked = Path(config["ckpt"]) if config["ckpt"] else None
    path = last if last.exists() else asked
    if path is None:
        return None, {}
    content = checkpoint.read(path)
    began = content["config"].get("ckpt")
    if asked is not None and path == last and not any(_same(asked, own) for own in (began, last) if own):
        raise AntherError(
            f"{folder} holds a run that began from {began or 'nothing'} and goes on from its own {last.name}, not from "
            f"ckpt={asked}: leave ckpt out to go on with it, or choose another hydra.run.dir."
        )
    checkpoint.check_fits(content, config, path)
    if path != last:
        _check_left(content, config["trainer"], path)
    return path, content["config"]


def _check_left(content: Mapping[str, Any], trainer: Mapping[str, Any], path: Path) -> None:
    """Refuses to begin a run from a checkpoint that is at the run's limit already."""
    # The checkpoint's own `epoch` counts one that max_steps ended in its middle.
    steps, epochs = content["global_step"], content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    for limit, made in (("max_steps", steps), ("max_epochs", epochs)):
        wanted = trainer.get(limit)
        if isinstance(wanted, int) and 0 <= wanted <= made and not trainer.get("fast_dev_run"):
            raise AntherError(
                f"{path} is at step {steps} after {epochs} epochs, so trainer.{limit}={wanted} leaves nothing to "
                f"train: give a trainer.{limit} above {made}."
            )


class _Retune(Callback):
    """Lets what the command says of the optimizer hold in a run that goes on, too."""

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        retune(checkpoint, pl_module.config)


def _same(one: Path, other: Path | str) -> bool:
    """Whether two paths name one file; neither need exist any more."""
    return one.absolute() == Path(other).absolute() or one.resolve() == Path(other).resolve()


def _same_data(
    datamodule: Any, module: Any, config: Mapping[str, Any], folder: Path, trainer: lightning.Trainer, own: bool
) -> None:
    """Holds the data against the record of what the folder's run has trained on, or makes that record.

    Args:
        datamodule: set up.
        module: whose conditioner may read files too.
        config: of the run.
        folder: of the run.
        trainer: knows its rank.
        own: whether the run goes on from a checkpoint of its own.
    """
    path = folder / "splits.json"
    files = {str(file): sha256(file) for file in getattr(getattr(module, "conditioner", None), "files", ())}
    here = datamodule.split_record() | ({"files": files} if files else {})
    if not own or not path.exists():
        if trainer.is_global_zero:
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(here, indent=1))
        return
    try:
        there = {"files": {}, **json.loads(path.read_text())}
        names, before = ({n for split in record["splits"].values() for n in split} for record in (here, there))
        digests = here["digest"], there["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{path} is damaged: delete it if the data are still those of the run.") from error
    lie = f" in {config['data']['path']}" if config["data"].get("path") else ""
    what = f"the data {here['data']!r}{lie}"
    if changed := [file for file, digest in files.items() if there["files"].get(file, digest) != digest]:
        what += f" have a file {changed[0]} of another content (sha256 {files[changed[0]][:12]})"
    elif digests[0] != digests[1]:
        example = f", such as {min(names ^ before)}" if names ^ before else ""
        what += (
            f" have another content (sha256 {digests[0][:12]}, not {digests[1][:12]}; {len(before - names)} images are "
            f"gone and {len(names - before)} are new{example})"
        )
    elif there["splits"] != here["splits"]:
        what += " are split differently"
    else:
        return
    raise AntherError(
        f"{what} since the run in {folder} began: bring back what it was, or choose another hydra.run.dir for a run on "
        "what it is."
    )


def _objective(trainer: lightning.Trainer, module: Any, datamodule: Any, metric: str) -> float | None:
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    if not trainer.limit_val_batches:
        if metric.startswith("val/"):
            return None
    elif metric not in metrics or not _of_the_end(trainer, module, metric):
        # The run ended between two validations, or not with an epoch in which the metric is taken, and what stands
        # there belongs to earlier weights; or an earlier process took the last one, logged it, and was killed before it
        # said so.
        loggers = trainer.loggers
        if any(getattr(part, "validated_at", None) == trainer.global_step for part in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.loggers = []
        metrics |= trainer.validate(module, datamodule, verbose=False)[0]
        trainer.loggers = loggers
    if metric not in metrics:
        known = ", ".join(sorted(metrics))
        raise AntherError(f"the objective {metric!r} was never logged; set objective to one of: {known}.")
    return float(metrics[metric])


def _of_the_end(trainer: lightning.Trainer, module: Any, metric: str) -> bool:
    """Whether this process took a metric of the weights that the run ends with."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    takers = [part for part in callbacks if isinstance(part, Measure) and part.gives(metric)]
    return all(step == trainer.global_step for step in (module.validated_at, *(part.taken_at for part in takers)))


@rank_zero_only
def _announce(
    config: Mapping[str, Any],
    datamodule: Any,
    module: Any,
    trainer: lightning.Trainer,
    resume: Path | None,
    folder: Path,
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    rows = {"run": config["name"], "data": datamodule.describe(), **module.describe()}
    if trainer.max_steps >= 0:
        limit = f"{trainer.max_steps} steps"
    elif trainer.max_epochs != -1:
        limit = f"{trainer.max_epochs} epochs"
    else:
        limit = f"for {config['trainer'].get('max_time') or 'as long as it is left alone'}"
    rows["training"] = f"{limit}, precision {trainer.precision}, seed {config['seed']}"
    rows["devices"] = f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}"
    rows["goes on from"] = str(resume) if resume else "nothing"
    rows["folder"] = str(folder)
    for key, value in rows.items():
        table.add_row(Text(key, "bold"), Text(str(value)))
    Console(soft_wrap=True).print(table)


@rank_zero_only
def _farewell(config: Mapping[str, Any], module: Any, objective: float | None, folder: Path) -> None:
    if objective is None:
        print(f"{config['objective']} = null, as trainer.limit_val_batches=0 leaves out the validation")
    else:
        print(f"{config['objective']} = {objective:.4g}")
    print(f"everything       {folder}")
    for name in ("samples", "reconstructions", "checkpoints", "logs", "plots", "profile"):
        if (folder / name).exists():
            print(f"{name:16} {folder / name}")
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists() and isinstance(module, Generator):
        print(f"draw with        python sample.py ckpt={last}")
