"""What goes wrong around a run: each fault ends with a sentence that says what to type, and nothing is lost."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import checkpoint
from diffusion.errors import AntherError
from tests.faults.forks import ROOT, Forks
from tests.faults.small import EVALUATE, TRAIN, difference, evaluated, trained


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:  # one bit in the middle of the weights
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize("how", ["truncated", "emptied", "flipped"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_named(how: str, tmp_path: Path) -> None:
    last, previous = tmp_path / "my runs" / "last.ckpt", tmp_path / "my runs" / "previous.ckpt"
    last.parent.mkdir()
    content = {"config": {}, "state_dict": {"weight": torch.zeros(10_000)}}
    for path in (last, previous):
        torch.save(content, path)
    spoil(last, how)
    with pytest.raises(AntherError, match="is not a whole checkpoint") as refusal:
        checkpoint.read(last)
    typed = re.search("`(.+)`", str(refusal.value))
    assert typed is not None
    subprocess.run(shlex.split(typed[1]), check=True)
    assert set(checkpoint.read(last)) == set(content)
    assert not previous.exists()
    spoil(last, how)
    with pytest.raises(AntherError, match="use another one"):
        checkpoint.read(last)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Unlike in length, so that what lies where in one is something else in the other.
    files = [tmp_path / "short.ckpt", tmp_path / "long.ckpt"]
    for value, path in enumerate(files):
        weight = torch.full((1000 + 5000 * value,), float(value))
        torch.save({"config": {"padding": "x" * 3000 * value}, "state_dict": {"weight": weight}}, path)
    last = tmp_path / "last.ckpt"
    shutil.copy(files[0], last)
    maps, replaced = torch.UntypedStorage.from_file, []

    def replace_and_map(*what: Any) -> Any:
        if not replaced:
            replaced.append(shutil.copy(files[1], tmp_path / "new"))
            (tmp_path / "new").replace(last)
        return maps(*what)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replace_and_map)
    assert torch.equal(checkpoint.read(last)["state_dict"]["weight"], torch.ones(6000))
    assert replaced


@pytest.mark.slow
def test_the_checkpoint_before_the_damaged_one_leads_to_the_same_end(forks: Forks, whole: Path, tmp_path: Path) -> None:
    words = ["train.py", *TRAIN, f"hydra.run.dir={tmp_path / 'run'}"]
    assert forks.run(*words, at_step=13).status == -9
    kept = tmp_path / "run" / "checkpoints"
    assert checkpoint.read(kept / "last.ckpt")["global_step"] == 13
    assert checkpoint.read(kept / "previous.ckpt")["global_step"] == 12
    spoil(kept / "last.ckpt", "flipped")
    refused = forks.run(*words)
    assert refused.status == 1
    typed = re.search(r"error: .*last\.ckpt is not a whole checkpoint .*`(mv .+)`", refused.printed)
    assert typed is not None, refused.printed
    subprocess.run(shlex.split(typed[1]), check=True)
    assert forks.run(*words).status == 0
    assert difference(trained(whole), trained(tmp_path / "run")) is None


@pytest.mark.slow
def test_a_disk_that_is_full_keeps_the_checkpoint(forks: Forks, whole: Path, tmp_path: Path) -> None:
    words = ["train.py", *TRAIN, f"hydra.run.dir={tmp_path / 'run'}"]
    assert forks.run(*words, at_step=7).status == -9
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    ended = forks.run(*words, room=len(before) // 2)
    assert ended.status == 1
    assert f"error: cannot write {last} whole: free some space" in ended.printed
    assert "Traceback" not in ended.printed
    assert last.read_bytes() == before
    assert not list(tmp_path.rglob(".part-*"))
    assert forks.run(*words).status == 0
    assert difference(trained(whole), trained(tmp_path / "run")) is None


@pytest.mark.slow
def test_sigterm_ends_a_training_after_its_step_and_it_goes_on(forks: Forks, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # No save but the one that the signal asks for.
    rare = [*TRAIN, "callbacks.last.every_n_steps=1000", f"hydra.run.dir={folder}"]
    ended = forks.run("train.py", *rare, at_step=6, number=15)
    assert ended.status == 143, ended.printed
    assert f"stopped by SIGTERM: the same command with hydra.run.dir={folder} goes on" in ended.printed
    assert "Traceback" not in ended.printed
    assert checkpoint.read(folder / "checkpoints" / "last.ckpt")["global_step"] == 7
    assert forks.run("train.py", *rare).status == 0
    assert difference(trained(whole), trained(folder)) is None


@pytest.mark.slow
def test_sigterm_ends_an_evaluation_and_it_goes_on(
    forks: Forks, whole: Path, whole_evaluation: Path, tmp_path: Path
) -> None:
    words = ["evaluate.py", f"ckpt={whole}/checkpoints/last.ckpt", *EVALUATE, f"hydra.run.dir={tmp_path / 'run'}"]
    printed = []
    for seconds in (0.5, 1.0, 2.0, 4.0):
        ended = forks.run(*words, after=seconds, number=15)
        if ended.status == 143:
            printed.append(ended.printed)
            assert "stopped by SIGTERM" in ended.printed
            assert "Traceback" not in ended.printed
    # The first may have been stopped before it knew its folder.
    assert f"stopped by SIGTERM: the same command with hydra.run.dir={tmp_path / 'run'} goes" in "".join(printed)
    assert forks.run(*words).status == 0
    assert difference(evaluated(whole_evaluation), evaluated(tmp_path / "run")) is None


@pytest.mark.slow
@pytest.mark.parametrize("array", [False, True], ids=["job", "array"])
def test_slurms_signal_saves_and_queues_the_job_again(
    array: bool, forks: Forks, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"} if array else {}
    slurm["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
    folder = tmp_path / "run"
    rare = [*TRAIN, "callbacks.last.every_n_steps=1000", f"hydra.run.dir={folder}"]
    ended = forks.run("train.py", *rare, at_step=6, number=10, environment=slurm)
    assert ended.status == 128 + 10, ended.printed
    assert (tmp_path / "called").read_text() == f"requeue {'70_7' if array else '77'}\n"
    assert not list(folder.rglob("hpc_ckpt*"))
    assert checkpoint.read(folder / "checkpoints" / "last.ckpt")["global_step"] == 7
    assert forks.run("train.py", *rare, environment=slurm).status == 0
    assert difference(trained(whole), trained(folder)) is None


@pytest.mark.slow
def test_other_data_in_the_same_folder_are_noticed(forks: Forks, whole: Path, tmp_path: Path) -> None:
    rng, names = np.random.default_rng(0), []
    for name in ("daisy", "roses", "sunflowers"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(8):
            names.append(f"{name}/{k}.png")
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / names[-1])
    np.savez(tmp_path / "clip.npz", path=names, embedding=rng.normal(size=(24, 512)).astype(np.float32))
    folder = tmp_path / "run"
    words = ["train.py", "experiment=flowers_small", "network.down_chs=[32,32,32]", "data.batch_size=2"]
    words += ["data.split={train: 0.75, val: 0.25}", "callbacks.samples=null", f"data.path={tmp_path / 'photos'}"]
    words += [f"conditioner.path={tmp_path / 'clip.npz'}", "trainer.max_epochs=-1", f"hydra.run.dir={folder}"]
    done = forks.run(*words, "trainer.max_steps=2")
    assert done.status == 0, done.printed
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()

    def refused(*more: str) -> str:
        ended = forks.run(*words, *more, "trainer.max_steps=4")
        assert ended.status == 1, ended.printed
        assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before
        (said,) = re.findall("error: (the data 'cropped_flowers' .*)", ended.printed)
        assert f"since the run in {folder} began" in said
        return str(said)

    photo, table = tmp_path / "photos" / "roses" / "3.png", tmp_path / "clip.npz"
    whole_photo, whole_table = photo.read_bytes(), table.read_bytes()
    Image.new("RGB", (32, 32)).save(photo)
    assert f"in {tmp_path / 'photos'} have another content" in refused()
    photo.unlink()
    assert "1 images are gone and 0 are new, such as roses/3.png" in refused()
    photo.write_bytes(whole_photo)
    table.write_bytes(whole_table + b" ")
    assert f"have a file {table} of another content" in refused()
    table.write_bytes(whole_table)
    assert "are split differently" in refused("data.split_seed=1")
    done = forks.run(*words, "trainer.max_steps=4")
    assert done.status == 0, done.printed


@pytest.mark.slow
def test_two_runs_in_one_folder(forks: Forks, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [sys.executable, "train.py", *TRAIN, "trainer.max_steps=100000", f"hydra.run.dir={folder}"]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while first.poll() is None and not (folder / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.05)
    for script, more in (("train.py", TRAIN), ("evaluate.py", [f"ckpt={whole}/checkpoints/last.ckpt", *EVALUATE])):
        second = forks.run(script, *more, f"hydra.run.dir={folder}")
        assert second.status == 1
        assert f"error: {folder} is in use by process {first.pid} on " in second.printed
    first.terminate()
    printed = first.communicate(timeout=120)[0]
    assert first.returncode == 143, printed
    assert not (folder / ".lock").exists()


@pytest.mark.slow
def test_wandb_that_is_not_there_is_told_and_training_goes_on(forks: Forks, whole: Path, tmp_path: Path) -> None:
    nobody = {"WANDB_MODE": None, "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    words = [*TRAIN, "logger=wandb", f"hydra.run.dir={tmp_path / 'run'}"]
    ended = forks.run("train.py", *words, environment=nobody)
    assert ended.status == 0, ended.printed
    assert "W&B: recording offline under" in ended.printed
    assert "for http://127.0.0.1:9 cannot be reached ([Errno 111] Connection refused)" in ended.printed
    assert list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(
    forks: Forks, whole: Path, whole_evaluation: Path, tmp_path: Path
) -> None:
    train = ["train.py", *TRAIN, f"hydra.run.dir={tmp_path / 'trained'}"]
    assert forks.run(*train, at_step=12, clock=3e8).status == -9
    for path in (tmp_path / "trained").rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert forks.run(*train, clock=-3e8).status == 0
    assert difference(trained(whole), trained(tmp_path / "trained")) is None
    words = ["evaluate.py", f"ckpt={whole}/checkpoints/last.ckpt", *EVALUATE, f"hydra.run.dir={tmp_path / 'evaluated'}"]
    forks.run(*words, after=1.0, clock=3e8)
    assert forks.run(*words, clock=-3e8).status == 0
    assert difference(evaluated(whole_evaluation), evaluated(tmp_path / "evaluated")) is None


@pytest.mark.slow
def test_a_locale_of_another_encoding_changes_nothing(forks: Forks, whole: Path, tmp_path: Path) -> None:
    rng, classes = np.random.default_rng(0), ["weiße_blüte", "雏菊"]
    for name in classes:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{k}.png")
    named = "[" + ",".join(f"'{name}'" for name in classes) + "]"
    words = ["experiment=flowers_small", "conditioner=labels", f"data.classes={named}", "data.nouns={}"]
    words += [f"data.path={tmp_path / 'photos'}", "data.split={train: 0.5, val: 0.5}", "data.batch_size=2"]
    words += ["network.down_chs=[32,32,32]", "network.c_embed_dim=2", "callbacks.samples=null"]
    words += ["trainer.max_steps=2", "trainer.max_epochs=-1", "trainer.check_val_every_n_epoch=1"]
    quick = ["sampler=ddim", "sampler.steps=2", "num_images=4", "batch_size=2", "clip=null", "nearest=null"]
    quick += ["inception=null", "dataset=null", f"prompts={named}"]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))} | ascii_only
    left = {}
    for locale in ("own", "ascii"):
        folder = tmp_path / locale
        for script, more, where in (
            ("train.py", words, folder),
            ("evaluate.py", [f"ckpt={tmp_path}/own/checkpoints/last.ckpt", *quick], folder / "evaluated"),
        ):
            more = [*more, f"hydra.run.dir={where}"]
            if locale == "own":
                ended = forks.run(script, *more)
                assert ended.status == 0, ended.printed
            else:
                command = [word.encode() for word in (sys.executable, script, *more)]
                done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, timeout=280)
                assert done.returncode == 0, done.stderr.decode()
        left[locale] = trained(folder), evaluated(folder / "evaluated")
    assert difference(left["own"][0], left["ascii"][0]) is None
    for metrics in (left["own"][1]["metrics"], left["ascii"][1]["metrics"]):
        assert metrics["run"]["prompts"] == classes
    assert difference(left["own"][1], left["ascii"][1]) is None
