import csv
import json
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from callbacks.checkpoints import LastCheckpoint
from callbacks.progress import ProgressLines, progress
from callbacks.record import RunRecord
from callbacks.samples import SampleGrid
from callbacks.throughput import Throughput
from callbacks.timestep_loss import TimestepLoss
from diffusion.loggers import CSVLog, finish, has_wandb_account, wandb_logger
from tests.callbacks.tiny_training import Dots, module, nervous_plateau, trainer

KEY = "0123456789abcdef" * 2 + "01234567"


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(table, name):
    return {int(row["step"]): float(row[name]) for row in table if row.get(name)}


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
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


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
    t = trainer(tmp_path, grid, RunRecord(), Throughput(), logger=[CSVLog(tmp_path / "m.csv"), log])
    t.fit(m, datamodule=Dots())
    finish(t.loggers)

    (file,) = (tmp_path / "logs" / "wandb").glob("offline-run-*/*.wandb")
    config, summary, history, artifact, run = {}, {}, [], {}, None
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
                history.append(items(record.history.item))
            case "artifact":
                artifact |= {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
    assert run.project == "anther-test"
    assert run.run_id == (tmp_path / "logs" / "wandb_id").read_text()
    assert config["schedule"] == {"T": 10}
    assert config["number_of_parameters"] == sum(p.numel() for p in m.parameters())
    by_name = {}
    for row in history:
        for name, value in row.items():
            by_name.setdefault(name, []).append(value)
    table = rows(tmp_path / "m.csv")
    for name in ("val/loss", "train/loss_epoch", "lr", "epoch_seconds", "images_per_second", "parameters"):
        assert by_name[name] == pytest.approx(list(column(table, name).values()), rel=1e-6)
    folder = file.parent / "files"
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
