import csv
import json
import re
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.clip import GenerationClipScore
from callbacks.nan_guard import NanGuard, NonFiniteError
from callbacks.progress import ProgressLines, StepsBar, duration, progress
from callbacks.record import RunRecord
from callbacks.samples import SampleGrid
from callbacks.throughput import Throughput
from callbacks.timestep_loss import TimestepLoss
from diffusion.evaluation.reals import split_identities
from diffusion.files import atomic
from diffusion.loggers import CSVLog, finish, has_wandb_account, wandb_logger
from tests.callbacks.tiny_training import Dots, module, nervous_plateau, trainer

KEY = "0123456789abcdef" * 2 + "01234567"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(table, name):
    return {int(row["step"]): float(row[name]) for row in table if row.get(name)}


def test_the_record_knows_which_images_each_split_held(tmp_path):
    record, data = RunRecord(), Dots()
    trainer(tmp_path, record, max_epochs=1).fit(module(), datamodule=data)
    assert record.state_dict()["splits"] == split_identities(data)
    assert record.state_dict()["splits"].keys() == {"train", "val"}


def test_csv_has_a_row_per_step_and_what_the_run_measured(tmp_path):
    log = CSVLog(tmp_path / "logs" / "metrics.csv")
    m = module(scheduler=nervous_plateau)
    trainer(tmp_path, Throughput(), RunRecord(), TimestepLoss(tmp_path, bins=5), logger=log).fit(m, datamodule=Dots())
    table = rows(log.path)
    steps = [int(row["step"]) for row in table]
    assert steps == list(range(8))
    assert list(column(table, "val/loss")) == [3, 7]
    assert column(table, "lr")[7] == pytest.approx(1e-3)
    assert column(table, "parameters") == {0: sum(p.numel() for p in m.parameters())}
    for name in ("epoch_seconds", "images_per_second"):
        assert list(column(table, name)) == [3, 7]
    speed, seconds = column(table, "images_per_second")[7], column(table, "epoch_seconds")[7]
    assert speed * seconds == pytest.approx(16, rel=1e-4)
    assert "peak_gpu_mem_mb" not in table[0]


def test_a_resumed_run_goes_on_in_the_same_file_without_repeated_steps(tmp_path):
    def fit(folder, epochs, ckpt=None, callbacks=()):
        log = CSVLog(folder / "metrics.csv")
        t = trainer(folder, LastCheckpoint(folder, every_n_steps=4), *callbacks, logger=log, max_epochs=epochs)
        t.fit(module(), datamodule=Dots(), ckpt_path=ckpt, weights_only=True)
        return rows(log.path)

    uninterrupted = fit(tmp_path / "whole", 3)
    fit(tmp_path, 2)
    resume_from = (tmp_path / "last.ckpt").read_bytes()
    fit(tmp_path, 4, tmp_path / "last.ckpt")  # logged up to step 15 ...
    (tmp_path / "last.ckpt").write_bytes(resume_from)  # ... and then killed before it could save
    resumed = fit(tmp_path, 3, tmp_path / "last.ckpt")
    assert resumed == uninterrupted


def test_the_peak_of_a_gpus_memory_is_that_of_the_epoch(monkeypatch):
    # Stands in for a GPU whose counter is at 6 MiB since its last reset.
    device, called, logged = torch.device("cuda", 0), [], {}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda of: called.append(("synchronize", of)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda of: called.append(("reset", of)))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda of: 6 * 2**20 if of == device else 0)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}])
    t, m = SimpleNamespace(world_size=1, optimizers=[optimizer]), SimpleNamespace(device=device)
    m.log_dict = lambda values, rank_zero_only: logged.update(values)
    part = Throughput()
    part.on_train_epoch_start(t, m)
    assert called == [("reset", device), ("synchronize", device)]
    part.on_train_epoch_end(t, m)
    assert called[2:] == [("synchronize", device)]
    assert logged["peak_gpu_mem_mb"] == 6


def test_a_log_that_takes_long_to_write_is_written_less_often(tmp_path, monkeypatch):
    clock, written = [100.0], []

    def slow(path):
        clock[0] += 0.5
        written.append(clock[0])
        return atomic(path)

    monkeypatch.setattr("diffusion.loggers.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("diffusion.loggers.atomic", slow)
    log = CSVLog(tmp_path / "metrics.csv")
    for step in range(60):
        clock[0] += 0.5
        log.log_metrics({"a": 1.0}, step)
    assert written == [101.0, 112.0, 123.0]


def test_loss_by_time_is_the_mean_of_its_part(tmp_path):
    m = module()
    keep = {"t": [], "loss": []}

    class Read(TimestepLoss):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            for name in keep:
                keep[name].append(pl_module.last_losses[name].double())
            super().on_validation_batch_end(trainer, pl_module, *args)

    t = trainer(tmp_path, Read(tmp_path, bins=5), max_epochs=1)
    t.fit(m, datamodule=Dots())
    times, losses = torch.cat(keep["t"]), torch.cat(keep["loss"])
    for k in range(5):
        inside = losses[(times > k / 5 + 1e-9) & (times <= (k + 1) / 5 + 1e-9)]
        assert float(t.callback_metrics[f"val/loss_by_t/{(k + 0.5) / 5:.2f}"]) == pytest.approx(
            float(inside.mean()), rel=1e-5
        )
    assert Image.open(tmp_path / "val_loss_by_t.png").size == (600, 400)


def test_lines_are_legible_in_a_file(tmp_path, capsys):
    assert isinstance(progress(), ProgressLines)  # pytest's output is no terminal
    trainer(tmp_path, progress(), enable_progress_bar=True).fit(module(), datamodule=Dots())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2/2  step 8  train/loss ")
    assert "val/loss" in lines[1]
    assert not any(c in "".join(lines) for c in "\r\x1b")


def test_under_max_steps_the_lines_say_how_far_the_run_is(tmp_path, capsys):
    t = trainer(tmp_path, ProgressLines(every_seconds=0), max_epochs=-1, max_steps=10, enable_progress_bar=True)
    t.fit(module(), datamodule=Dots())
    lines = capsys.readouterr().out.splitlines()
    # Four batches an epoch; a line per batch and one at each epoch's end.
    assert lines[5].startswith("step 5/10  epoch 2  batch 1/4  train/loss ")
    assert lines[9].startswith("step 8/10  epoch 2  train/loss ")
    assert lines[-1].startswith("step 10/10  epoch 3  train/loss ")
    assert all(line.endswith(" left") == (not line.startswith("step 10/")) for line in lines), lines
    assert lines[5].rsplit("  ", 1)[1].startswith("about ")


def test_about_how_long_the_rest_takes_is_told(tmp_path, capsys, monkeypatch):
    t = trainer(tmp_path, ProgressLines(every_seconds=0), max_epochs=4, enable_progress_bar=True)
    clock = iter(range(0, 10**6, 30))  # a look a second would say nothing in so short a training
    monkeypatch.setattr("callbacks.progress.time.monotonic", lambda: next(clock))
    t.fit(module(), datamodule=Dots())
    lines = capsys.readouterr().out.splitlines()
    # Two looks a batch: after one of 16 batches a minute is over.
    assert lines[0].startswith("epoch 1/4  batch 1/4  ")
    assert lines[0].endswith("about 15 min left")
    assert [duration(s) for s in (0.1, 59, 60, 5000, 9000)] == ["1 s", "59 s", "1 min", "83 min", "2.5 h"]


def test_the_bar_has_no_negative_epochs(tmp_path):
    bar = StepsBar()
    trainer(tmp_path, bar, max_epochs=-1, max_steps=5, enable_progress_bar=True).fit(module(), datamodule=Dots())
    assert bar._get_train_description(1) == "Epoch 1, from step 5/5"
    bar._trainer = trainer(tmp_path, max_epochs=3)
    assert bar._get_train_description(1).strip() == "Epoch 1/2"


def test_the_remedy_for_a_loss_that_is_no_number_composes():
    with pytest.raises(NonFiniteError) as stopped:
        NanGuard._require(trainer(Path()), False, "loss")
    (override,) = re.findall(r"lower ([\w.]+)", str(stopped.value))
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        config = compose("train", overrides=[f"{override}=0.125"])
        assert config.module.optimizer.lr == 0.125


def whole(path):
    """The records of a W&B run file, as soon as its writer, which is a process of its own, is done with it."""
    for _ in range(100):
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise TimeoutError(path)


def records(path):
    """The records of a W&B run file: a LevelDB log (blocks of 32 KiB; crc, length, type) behind 7 bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # still being written
            return
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def offline(folder):
    """The record of the offline run: config, summary, values by name, files of its artifacts, and the run itself."""
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    config, summary, by_name, artifacts, run = {}, {}, {}, [], None
    for record in whole(file):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                config |= items(record.run.config.update)
            case "config":
                config |= items(record.config.update)
            case "summary":
                summary |= items(record.summary.update)
            case "history":
                for name, value in items(record.history.item).items():
                    by_name.setdefault(name, []).append(value)
            case "artifact":
                artifacts.append(record.artifact)
    return file.parent / "files", config, summary, by_name, artifacts, run


def paths(artifacts):
    return {entry.path: Path(entry.local_path) for artifact in artifacts for entry in artifact.manifest.contents}


def items(updates):
    return {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in updates}


@pytest.fixture
def no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


def test_accounts_are_found_where_wandb_keeps_them(no_account, monkeypatch, tmp_path):
    assert not has_wandb_account()
    file = tmp_path / "home" / ".netrc"
    file.parent.mkdir()
    file.write_text(f"machine other.example\n  login user\n  password {KEY}\n")
    assert not has_wandb_account()
    file.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    assert has_wandb_account()
    file.unlink()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert has_wandb_account()


def test_what_wandb_holds(no_account, monkeypatch, tmp_path, capsys):
    log = wandb_logger("anther-test", tmp_path / "logs")
    said = capsys.readouterr().out
    assert "offline" in said
    assert "no account" in said
    # From here on a key is around, and must not end up in any file.
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    m = module(scheduler=nervous_plateau)
    m.config = {"schedule": {"T": 10}, "seed": 3}
    grid = SampleGrid(tmp_path / "samples", ["a daisy", "roses"], [0.0, 2.0], every_n_epochs=2, gif="never")
    prompts = ["a red rose", "two white daisies"]
    clip = GenerationClipScore(prompts, [0.0, 2.0], "anther-flowers-32", "embedded", every_n_epochs=2)
    parts = [grid, clip, TimestepLoss(tmp_path / "plots"), RunRecord(), Throughput()]
    t = trainer(tmp_path, *parts, logger=[CSVLog(tmp_path / "m.csv"), log])
    t.fit(m, datamodule=Dots())
    finish(t.loggers)

    folder, config, summary, by_name, artifacts, run = offline(tmp_path / "logs")
    artifact = paths(artifacts)
    assert run.project == "anther-test"
    assert run.run_id == (tmp_path / "logs" / "wandb_id").read_text()
    assert config["schedule"] == {"T": 10}
    assert config["number_of_parameters"] == sum(p.numel() for p in m.parameters())
    assert config["num_samples"] == 16  # two thirds of 24
    table = rows(tmp_path / "m.csv")
    names = ["val/loss", "train/loss_step", "train/loss_epoch", "lr", "epoch_seconds", "images_per_second"]
    names += ["parameters", "val/clip_score", "val/clip_score_w2"]
    names += [name for name in table[0] if name.startswith("val/loss_by_t/")]
    for name in names:
        assert by_name[name] == pytest.approx(list(column(table, name).values()), rel=1e-6), name
    assert len(by_name["train/loss_step"]) == 8
    assert set(by_name["epoch"]) == {0, 1}
    assert len(by_name["val/clip_score"]) == 1
    *_, (curve,) = by_name["val_loss_by_t/filenames"]
    assert (folder / curve).read_bytes() == (tmp_path / "plots" / "val_loss_by_t.png").read_bytes()
    ((picture,),) = by_name["samples_grid/filenames"]
    assert (folder / picture).read_bytes() == (tmp_path / "samples" / "step-000008.png").read_bytes()
    (held_at,) = by_name["sample_prediction/path"]
    held = json.loads((folder / held_at).read_text())
    assert held["columns"] == ["epoch", "Class_Label", "guidance_weight", "image"]
    assert [row[:3] for row in held["data"]] == [
        [1, "a daisy", 0.0], [1, "roses", 0.0], [1, "a daisy", 2.0], [1, "roses", 2.0]
    ]  # fmt: skip
    # The table's pictures travel in the artifact of the table.
    (full,) = (path for name, path in artifact.items() if name.endswith(".table.json"))
    pictures = [artifact[row[3]["path"]] for row in json.loads(full.read_text())["data"]]
    assert [Image.open(path).size for path in pictures] == [(8, 8)] * 4
    assert len({path.read_bytes() for path in pictures}) == 4
    assert summary["final_val_loss"] == pytest.approx(by_name["val/loss"][-1])
    assert summary["best_val_loss"] == pytest.approx(min(by_name["val/loss"]))
    assert summary["best_train_loss"] == pytest.approx(min(by_name["train/loss_epoch"]))
    assert (summary["total_epochs"], summary["total_batches"]) == (2, 8)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_run_that_breaks_off_has_its_best_losses_in_wandb(no_account, tmp_path):
    class Boom(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 6:
                raise RuntimeError("boom")

    log = wandb_logger("anther-test", tmp_path / "logs")
    t = trainer(tmp_path, RunRecord(), Boom(), logger=log)
    with pytest.raises(RuntimeError, match="boom"):
        t.fit(module(), datamodule=Dots())
    finish([log])  # as the end of the process does
    _, _, summary, by_name, *_ = offline(tmp_path / "logs")
    assert summary["best_val_loss"] == pytest.approx(min(by_name["val/loss"]))
    assert summary["best_train_loss"] == pytest.approx(min(by_name["train/loss_epoch"]))
    assert "final_val_loss" not in summary


@pytest.mark.parametrize("log_model", [False, True, "all"])
def test_the_best_checkpoints_are_artifacts_of_an_offline_run(no_account, tmp_path, log_model):
    def best(folder):
        measures = {"val": "val/loss", "train": "train/loss_epoch"}
        return [BestCheckpoint(dirpath=folder, filename=n, monitor=m) for n, m in measures.items()]

    def fit(folder, logger, epochs, ckpt=None):
        parts = [RunRecord(), LastCheckpoint(tmp_path / "checkpoints"), *best(tmp_path / "checkpoints")]
        t = trainer(tmp_path, *parts, logger=logger, max_epochs=epochs)
        t.fit(module(), datamodule=Dots(), ckpt_path=ckpt, weights_only=True)
        return t.callbacks

    # A process that is killed leaves its best checkpoints to the next, which has none that is better.
    fit(tmp_path, False, 2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    log = wandb_logger("anther-test", tmp_path / "logs", log_model=log_model, checkpoint_name="unet_flowers_clip")
    fit(tmp_path, log, 2, last)
    finish([log])
    *_, artifacts, _ = offline(tmp_path / "logs")
    models = [artifact for artifact in artifacts if artifact.type == "model"]
    files = [path for artifact in models for path in paths([artifact]).values()]
    assert {artifact.name for artifact in models} == ({"unet_flowers_clip"} if log_model else set())
    found = [path for name in ("val", "train") for path in (tmp_path / "checkpoints").glob(f"{name}*.ckpt")]
    kept = [path.read_bytes() for path in found]
    assert len(kept) == 2
    assert sorted(map(Path.read_bytes, files)) == (sorted(kept) if log_model else [])
    # No copy of those that stay.
    assert log_model is not True or all(path.parent == tmp_path / "checkpoints" for path in files)


def test_a_server_that_does_not_answer_is_told_and_not_waited_for(no_account, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # it answers 501
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        Thread(target=server.handle_request, daemon=True).start()
        assert wandb_logger("anther-test", tmp_path / "logs")._wandb_init["mode"] == "online"
        assert capsys.readouterr().out == ""
    assert wandb_logger("anther-test", tmp_path / "logs")._wandb_init["mode"] == "offline"
    said = capsys.readouterr().out
    assert f"for http://127.0.0.1:{server.server_port} cannot be reached" in said
    assert KEY not in said


def test_a_resumed_run_keeps_its_wandb_id(no_account, tmp_path):
    first = wandb_logger("anther-test", tmp_path / "logs")
    assert wandb_logger("anther-test", tmp_path / "logs").version == first.version
    assert wandb_logger("anther-test", tmp_path / "other").version != first.version


def test_tensorboard_gets_numbers_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLogger(tmp_path, name="tensorboard", version="")
    grid = SampleGrid(tmp_path / "samples", ["a daisy"], every_n_epochs=1, gif="never")
    trainer(tmp_path, grid, RunRecord(), logger=log).fit(module(), datamodule=Dots())
    held = EventAccumulator(str(tmp_path / "tensorboard"))
    held.Reload()
    assert [e.step for e in held.Images("samples_grid")] == [4, 8]
    assert len(held.Scalars("val/loss")) == 2


def test_heavy_modules_are_not_imported(tmp_path):
    import subprocess

    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import callbacks.samples, callbacks.clip, callbacks.timestep_loss, callbacks.record, callbacks.progress\n"
        "print([m for m in ('wandb', 'open_clip', 'fiftyone') if m in sys.modules])"
    )
    root = str(Path(__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr
