import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.ema import EMA
from callbacks.nan_guard import NanGuard
from diffusion.checkpoint_io import AtomicCheckpointIO
from diffusion.errors import AntherError
from diffusion.loggers import CSVLog
from tests.callbacks.tiny_training import Dots, module, nervous_plateau, same, trainer, weights

EPOCHS = 4


class Trace(Callback):
    def __init__(self):
        self.lr, self.val, self.stepped = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.val.append(float(trainer.callback_metrics.get("val/loss", 0)))
        self.stepped.append(trainer.fit_loop.epoch_loop._batches_that_stepped)


class Boom(Callback):
    """Raises when a hook is called for the n-th time."""

    def __init__(self, hook, nth, error=RuntimeError):
        self.left = nth

        def fail(*args, **kwargs):
            self.left -= 1
            if not self.left:
                raise error("boom")

        setattr(self, hook, fail)


def run(folder, *callbacks, epochs=EPOCHS, ckpt=None, **options):
    m, ema, trace = module(scheduler=nervous_plateau, lr=1e-2), EMA(), Trace()
    t = trainer(folder, ema, trace, *callbacks, max_epochs=epochs, logger=CSVLog(folder / "metrics.csv"), **options)
    t.fit(m, datamodule=Dots(), ckpt_path=ckpt, weights_only=True)
    ema.folder = folder
    return m, ema, trace, t


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, LastCheckpoint(folder))


@pytest.mark.parametrize(
    ("hook", "nth"),
    [
        ("on_train_epoch_start", 3),
        ("on_train_batch_start", 5),  # the first of an epoch
        ("on_before_backward", 7),
        ("on_train_batch_end", 7),
        ("on_before_backward", 8),  # the last of an epoch
        ("on_train_batch_end", 8),
        ("on_validation_start", 2),
        ("on_validation_batch_end", 3),
        ("on_validation_end", 2),
        ("on_train_epoch_end", 2),
        (None, 0),
    ],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path, uninterrupted, hook, nth):
    if hook is None:  # finished, and then made longer
        run(tmp_path, LastCheckpoint(tmp_path), epochs=2)
    else:
        with pytest.raises(RuntimeError, match="boom"):
            run(tmp_path, LastCheckpoint(tmp_path), Boom(hook, nth))
    m, ema, trace, _ = run(tmp_path, LastCheckpoint(tmp_path), ckpt=tmp_path / "last.ckpt")
    whole, whole_ema, whole_trace, _ = uninterrupted
    assert same(weights(m), weights(whole))
    assert ema.updates == whole_ema.updates
    with ema.swapped(m), whole_ema.swapped(whole):
        assert same(weights(m), weights(whole))
    for got, wanted in [(trace.lr, whole_trace.lr), (trace.val, whole_trace.val), (trace.stepped, whole_trace.stepped)]:
        assert got == wanted[-len(got) :]
    assert len(trace.lr) in (2, 3)
    # A row per step, the epochs' means with what was averaged before the interruption.
    log = CSVLog(whole_ema.folder / "metrics.csv")._read()
    assert [sorted(row) for row in log.values()].count(["epoch", "train/loss_step"]) == 12
    assert CSVLog(tmp_path / "metrics.csv")._read() == log


VALIDATIONS = {
    "every second epoch": {"check_val_every_n_epoch": 2},
    "every six steps": {"val_check_interval": 6, "check_val_every_n_epoch": None},
}


@pytest.fixture(scope="module")
def uninterrupted_with(tmp_path_factory):
    """What the plateau scheduler did in whole runs, by when they validate."""

    def whole(validations):
        folder = tmp_path_factory.mktemp("whole")
        return run(folder, LastCheckpoint(folder, every_n_steps=1, share=1.0), **VALIDATIONS[validations])

    return functools.cache(whole)


@pytest.mark.parametrize("validations", VALIDATIONS)
@pytest.mark.parametrize(
    ("hook", "nth"),
    [
        ("on_train_epoch_start", 3),
        ("on_before_backward", 8),  # the last of its epoch
        ("on_before_backward", 11),
        ("on_train_batch_end", 12),  # the last of its epoch
        ("on_train_epoch_end", 2),
    ],
)
def test_a_plateau_that_is_not_validated_in_every_epoch_goes_on_exactly(
    tmp_path, uninterrupted_with, hook, nth, validations
):
    m, _, trace, _ = uninterrupted_with(validations)
    options = VALIDATIONS[validations]
    with pytest.raises(RuntimeError, match="boom"):
        run(tmp_path, LastCheckpoint(tmp_path, every_n_steps=1, share=1.0), Boom(hook, nth), **options)
    n, _, resumed, _ = run(tmp_path, LastCheckpoint(tmp_path), ckpt=tmp_path / "last.ckpt", **options)
    assert resumed.lr == trace.lr[-len(resumed.lr) :]
    assert same(weights(n), weights(m))
    assert "unseen_val_loss" not in torch.load(tmp_path / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(("validations", "seen"), [({}, 4), ({"check_val_every_n_epoch": 2}, 2)])
def test_a_plateau_sees_each_validation_once(tmp_path, validations, seen):
    _, _, _, t = run(tmp_path, **validations)
    assert t.lr_scheduler_configs[0].scheduler.last_epoch == seen


def test_a_run_that_ends_within_an_epoch_goes_on_from_there(tmp_path):
    whole, _, _, _ = run(tmp_path / "a", epochs=None, max_steps=7)
    run(tmp_path, LastCheckpoint(tmp_path), epochs=None, max_steps=3)
    m, _, _, _ = run(tmp_path, LastCheckpoint(tmp_path), epochs=None, max_steps=7, ckpt=tmp_path / "last.ckpt")
    assert same(weights(m), weights(whole))


def test_a_run_that_ends_with_a_validation_within_an_epoch_goes_on_counting_steps(tmp_path):
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "epochs": None}
    whole, _, there, _ = run(tmp_path / "a", max_steps=7, **options)
    run(tmp_path, LastCheckpoint(tmp_path), max_steps=3, **options)
    m, _, here, _ = run(tmp_path, LastCheckpoint(tmp_path), max_steps=7, ckpt=tmp_path / "last.ckpt", **options)
    assert same(weights(m), weights(whole))
    assert here.stepped == there.stepped[-len(here.stepped) :]
    assert list(CSVLog(tmp_path / "metrics.csv")._read()) == list(CSVLog(tmp_path / "a" / "metrics.csv")._read())


def test_a_run_by_steps_survives_one_interruption_after_another(tmp_path):
    whole, _, there, _ = run(tmp_path / "whole", LastCheckpoint(tmp_path / "whole"), epochs=None, max_steps=12)
    last = tmp_path / "last.ckpt"
    booms = [
        ("on_validation_start", 1),
        ("on_train_batch_start", 1),
        ("on_before_backward", 2),
        ("on_validation_end", 1),
    ]
    for hook, nth in [*booms, ("on_train_epoch_start", 1)]:
        ckpt = last if last.exists() else None
        with pytest.raises(RuntimeError, match="boom"):
            run(tmp_path, LastCheckpoint(tmp_path), Boom(hook, nth), epochs=None, max_steps=12, ckpt=ckpt)
    m, _, trace, _ = run(tmp_path, LastCheckpoint(tmp_path), epochs=None, max_steps=12, ckpt=last)
    assert same(weights(m), weights(whole))
    assert trace.stepped == there.stepped[-len(trace.stepped) :]
    assert CSVLog(tmp_path / "metrics.csv")._read() == CSVLog(tmp_path / "whole" / "metrics.csv")._read()


def test_checkpoints_leave_the_schedule_alone(tmp_path):
    """Lightning counts a run by steps as restarting once its loop is told that it is not."""
    _, _, plain, _ = run(tmp_path / "a", epochs=None, max_steps=12)
    _, _, saved, _ = run(tmp_path, LastCheckpoint(tmp_path), epochs=None, max_steps=12)
    assert saved.lr == plain.lr
    assert len(set(plain.lr)) == 2


def test_a_best_checkpoint_can_be_gone_on_from(tmp_path, uninterrupted):
    best = BestCheckpoint(
        dirpath=tmp_path, filename="best{epoch}", monitor="val/loss", save_top_k=-1, auto_insert_metric_name=False
    )
    run(tmp_path, LastCheckpoint(tmp_path), best, epochs=2)
    m, _, trace, _ = run(tmp_path, LastCheckpoint(tmp_path), ckpt=tmp_path / "best1.ckpt")
    assert same(weights(m), weights(uninterrupted[0]))
    assert trace.lr == uninterrupted[2].lr[1:]


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from lightning.pytorch.callbacks import Callback
from diffusion import cli
from tests.callbacks.test_checkpoints import LastCheckpoint, run

class Press(Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.{name})

folder = Path({folder!r})
cli.run(lambda: run(folder, Press(), LastCheckpoint(folder)))
"""


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_a_signal_stops_after_the_step_and_the_run_goes_on_exactly(tmp_path, uninterrupted, name):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    script = SCRIPT.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path), name=name)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 128 + signal.Signals[name], result.stderr
    assert "the same command goes on" in result.stderr
    assert f"stopped by {name}" in result.stderr
    assert "Traceback" not in result.stderr
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    m, _, _, _ = run(tmp_path, LastCheckpoint(tmp_path), ckpt=tmp_path / "last.ckpt")
    assert same(weights(m), weights(uninterrupted[0]))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_killed_save_leaves_the_previous_checkpoint(tmp_path):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"x": torch.ones(3)}, tmp_path / "last.ckpt")
    script = textwrap.dedent(f"""
        import os, sys, torch
        sys.path.insert(0, {str(Path(__file__).parents[2])!r})
        from diffusion.checkpoint_io import AtomicCheckpointIO
        class Bomb:
            def __reduce__(self): os._exit(9)
        AtomicCheckpointIO().save_checkpoint({{"x": torch.zeros(10**6), "y": Bomb()}}, {str(tmp_path / "last.ckpt")!r})
    """)
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 9
    assert io.load_checkpoint(tmp_path / "last.ckpt", weights_only=True)["x"].sum() == 3


def test_an_unwritable_folder_gives_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AntherError, match="cannot write"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


class LogEvery2(Callback):
    """A measure that is taken in every second validation, best in the second epoch."""

    values = {1: 0.9, 3: 0.5}  # noqa: RUF012

    def on_validation_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch in self.values:
            pl_module.log("val/clip_score", self.values[trainer.current_epoch])


def test_best_by_a_measure_that_is_not_always_taken(tmp_path):
    best = BestCheckpoint(
        dirpath=tmp_path,
        filename="best_clip-epoch{epoch:04d}-{val/clip_score:.4f}",
        monitor="val/clip_score",
        mode="max",
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    trainer(tmp_path, LogEvery2(), best, max_epochs=5).fit(module(), datamodule=Dots())
    assert os.listdir(tmp_path) == ["best_clip-epoch0001-0.9000.ckpt"]  # noqa: PTH208
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] == 8


@pytest.mark.parametrize("how", ["moved", "its last checkpoint copied", "begun from it"])
def test_a_moved_run_knows_its_best_checkpoint_and_another_run_does_not(tmp_path, how):
    there, here = tmp_path / "there", tmp_path / "here"

    def fit(folder, epochs, ckpt=None):
        best = BestCheckpoint(dirpath=folder, filename="best{epoch}", monitor="val/clip_score", mode="max")
        t = trainer(folder, LogEvery2(), best, LastCheckpoint(folder), max_epochs=epochs)
        t.fit(module(), datamodule=Dots(), ckpt_path=ckpt, weights_only=True)
        return best

    fit(there, 2)
    if how == "moved":
        there.rename(here)
    elif how != "begun from it":
        here.mkdir()
        shutil.copy(there / "last.ckpt", here)
    best = fit(here, 4, (there if how == "begun from it" else here) / "last.ckpt")
    epoch, score = (1, 0.9) if how == "moved" else (3, 0.5)
    assert sorted(path.name for path in here.glob("best*")) == [f"bestepoch={epoch}.ckpt"]
    assert (best.best_model_path, best.best_model_score) == (
        str(here / f"bestepoch={epoch}.ckpt"),
        pytest.approx(score),
    )


def test_saving_takes_no_more_than_its_share_of_the_time(tmp_path):
    class Count(AtomicCheckpointIO):
        saves = 0

        def save_checkpoint(self, *args, **kwargs):
            self.saves += 1
            super().save_checkpoint(*args, **kwargs)

    rare, often = Count(), Count()
    trainer(tmp_path, LastCheckpoint(tmp_path, every_n_steps=1, share=1e-4), plugins=[rare]).fit(
        module(), datamodule=Dots()
    )
    trainer(tmp_path, LastCheckpoint(tmp_path, every_n_steps=1, share=1.0), plugins=[often]).fit(
        module(), datamodule=Dots()
    )
    assert rare.saves == 2  # the first, and the one at the end
    assert often.saves >= 8


class Spoil(Callback):
    """Makes the weights useless before a batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 6:
            batch["image"][0] = float("nan")


class SpoilGradient(Callback):
    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 6:
            next(pl_module.parameters()).grad[0] = float("inf")


@pytest.mark.parametrize(("fault", "what"), [(Spoil(), "loss"), (SpoilGradient(), "gradient")])
def test_a_loss_that_is_no_number_stops_before_the_step_and_keeps_the_checkpoint(tmp_path, fault, what):
    m = module()
    last = LastCheckpoint(tmp_path, every_n_steps=5, share=1.0)
    with pytest.raises(AntherError, match=f"the {what} is not finite at step 6 .*last good checkpoint is .*last.ckpt"):
        trainer(tmp_path, fault, NanGuard(), last, max_epochs=3).fit(m, datamodule=Dots())
    assert all(tensor.isfinite().all() for tensor in weights(m).values())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 5
