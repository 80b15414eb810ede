"""One run of train.py: build the parts, say what will happen, fit, and say where everything is."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_only

from diffusion import checkpoint
from diffusion.build import build
from diffusion.cli import write_result
from diffusion.errors import AntherError
from diffusion.loggers import finish
from diffusion.loss_curve import draw_losses
from diffusion.modules.generator import Generator
from diffusion.rng import check_seed


def train(config: dict[str, Any], folder: Path) -> float:
    """Trains what the config describes, going on from the folder's last checkpoint if there is one.

    Args:
        config: resolved, plain.
        folder: of the run.

    Returns:
        The metric named `objective`, at the end.

    Raises:
        AntherError: any fault that the user can mend.
    """
    # Its device list and its advertisements, and what it does with torch's insides; other warnings stay.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=DeprecationWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    check_seed(config["seed"])
    lightning.seed_everything(config["seed"], workers=True, verbose=False)
    resume = _resume_from(folder, config)
    datamodule = build(config["data"])
    module = build(config["module"])
    module.config = config
    trainer = build(
        config["trainer"],
        callbacks=_parts(config.get("callbacks")),
        logger=_parts(config.get("logger")),
    )
    datamodule.prepare_data()
    datamodule.setup("fit")
    _announce(config, datamodule, module, trainer, resume, folder)
    trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True)
    if trainer.fast_dev_run:
        return 0.0
    objective = _objective(trainer, module, datamodule, config["objective"])
    finish(trainer.loggers)
    if trainer.is_global_zero:
        datamodule.save_splits(folder / "splits.json")
        if (log := folder / "logs" / "metrics.csv").exists():
            draw_losses(log, folder / "plots" / "loss.png")
        count = sum(p.numel() for p in module.parameters())
        write_result(folder, config["objective"], objective, trainer.global_step, trainer.current_epoch, count)
    _farewell(config, module, objective, folder)
    return objective


def _parts(group: Mapping[str, Any] | None) -> list[Any]:
    """The parts of a group; what an experiment says of a part that the chosen group does not have is left aside."""
    return [build(node) for node in (group or {}).values() if node and "_target_" in node]


def _resume_from(folder: Path, config: Mapping[str, Any]) -> Path | None:
    """The run's own last checkpoint, else the one that `ckpt` names, else None."""
    last = folder / "checkpoints" / "last.ckpt"
    path = last if last.exists() else Path(config["ckpt"]) if config["ckpt"] else None
    if path is not None:
        checkpoint.check_fits(checkpoint.read(path), config, path)
    return path


def _objective(trainer: lightning.Trainer, module: Any, datamodule: Any, metric: str) -> float:
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    if metric not in metrics or getattr(module, "validated_at", trainer.global_step) != trainer.global_step:
        # The run ended between two validations, and what stands there belongs to earlier weights.
        metrics |= trainer.validate(module, datamodule, verbose=False)[0]
    if metric not in metrics:
        known = ", ".join(sorted(metrics))
        raise AntherError(f"the objective {metric!r} was never logged; set objective to one of: {known}.")
    return float(metrics[metric])


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

    table = Table.grid(padding=(0, 2))
    rows = {"run": config["name"], "data": datamodule.describe(), **module.describe()}
    limit = f"{trainer.max_steps} steps" if trainer.max_steps >= 0 else f"{trainer.max_epochs} epochs"
    rows["training"] = f"{limit}, precision {trainer.precision}, seed {config['seed']}"
    rows["devices"] = f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}"
    rows["goes on from"] = str(resume) if resume else "nothing"
    rows["folder"] = str(folder)
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/]", value)
    Console(soft_wrap=True).print(table)


@rank_zero_only
def _farewell(config: Mapping[str, Any], module: Any, objective: float, folder: Path) -> None:
    print(f"{config['objective']} = {objective:.4g}")
    print(f"everything   {folder}")
    for name, what in {
        "samples": "pictures",
        "reconstructions": "beside the originals",
        "checkpoints": "checkpoints",
        "logs": "logs",
        "plots": "plots",
    }.items():
        if (folder / name).exists():
            print(f"{what:12} {folder / name}")
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists() and isinstance(module, Generator):
        print(f"draw with    python sample.py ckpt={last}")
