"""train.py as a person runs it: from nothing, again, after a kill, and onward."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import checkpoint
from diffusion.assets import AssetError, resolve
from diffusion.checkpoint import load_model

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
TINY = [
    "experiment=demo",
    "data.n_train=64",
    "data.n_val=16",
    "data.batch_size=8",
    "network.down_chs=[32,32,32]",
    "sampler.steps=2",
    "trainer.accelerator=cpu",
]

Call = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "logs" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_everything_it_promises(
    call: Call, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    folder = call("train.py", *TINY, "trainer.max_steps=8", "trainer.check_val_every_n_epoch=1", "name=tiny")
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert "last.ckpt" in kept
    assert any(name.startswith("best_val_loss") for name in kept)
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 8
    printed = capfd.readouterr().out
    for announced in (
        r"run +tiny",
        r"data +drawn flowers: 64 train, 16 val images, 3×32×32, 4 classes .+",
        rf"network +UNet, {result['parameters']:,} parameters",
        r"schedule +ZeroTerminalSNR, T = 400, SNR .+",
        r"predicts +v",
        r"condition +CLIP anther-flowers-32 .+",
        r"training +8 steps, precision 32-true, seed 0",
        r"devices +1 x cpu",
        r"goes on from +nothing",
        rf"folder +{re.escape(str(folder))}",
    ):
        assert re.search(rf"^{announced} *$", printed, re.MULTILINE), announced
    assert list((folder / "samples").glob("*.png"))
    assert list((folder / "samples").glob("*.gif"))
    assert {path.name for path in (folder / "plots").iterdir()} >= {"loss.png", "val_loss_by_t.png"}
    splits = json.loads((folder / "splits.json").read_text())
    assert splits
    assert any(row.get("val/loss") for row in rows(folder))
    saved = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    assert saved["config"]["name"] == "tiny"
    assert saved["ema"]["updates"] == 8
    model = load_model(folder / "checkpoints" / "last.ckpt")
    averaged = saved["ema"]["network"]["out.3.weight"]
    assert torch.equal(model.denoiser.network.state_dict()["out.3.weight"], averaged)
    assert not torch.equal(saved["state_dict"]["denoiser.network.out.3.weight"], averaged)


def test_a_finished_run_says_so_and_a_longer_one_goes_on(call: Call, capfd: pytest.CaptureFixture[str]) -> None:
    folder = call("train.py", *TINY, "trainer.max_steps=3")
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    capfd.readouterr()
    call("train.py", *TINY, "trainer.max_steps=3", folder=folder)
    assert "is finished: 3 steps" in capfd.readouterr().out
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    call("train.py", *TINY, "trainer.max_steps=5", folder=folder)
    assert checkpoint.read(folder / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_a_run_that_a_callback_ended_is_finished_until_that_is_changed(
    call: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    stop = ["_target_=lightning.pytorch.callbacks.EarlyStopping", "monitor=val/loss", "patience=1", "min_delta=10"]
    quick = [*TINY, "callbacks=fit", "trainer.check_val_every_n_epoch=1", *(f"+callbacks.stop.{word}" for word in stop)]
    folder = call("train.py", *quick, "trainer.max_steps=60")
    result = (folder / "result.json").read_text()
    assert json.loads(result)["steps"] == 16
    capfd.readouterr()
    call("train.py", *quick, "trainer.max_steps=60", folder=folder)
    assert "is finished: 16 steps, 2 epochs" in (printed := capfd.readouterr().out)
    assert "change what ended it, trainer.max_time or a callback" in printed
    assert (folder / "result.json").read_text() == result
    patient = [word.replace("patience=1", "patience=2") for word in quick]
    call("train.py", *patient, "trainer.max_steps=60", folder=folder)
    assert json.loads((folder / "result.json").read_text())["steps"] == 24


def test_time_alone_limits_a_run_whose_rate_does_not_wait_for_its_end(
    call: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    limit = ["trainer.max_steps=-1", "trainer.max_time=00:00:00:01"]
    folder = call("train.py", *TINY, "callbacks=fit", "scheduler=plateau", *limit)
    assert "for 00:00:00:01, precision" in capfd.readouterr().out
    assert json.loads((folder / "result.json").read_text())["steps"] > 0


def test_guidance_acts_from_a_level_to_infinity(call: Call) -> None:
    folder = call("train.py", *TINY, "callbacks=fit", "trainer.max_steps=1", "guidance.interval=[0.3,inf]")
    model = load_model(folder / "checkpoints" / "last.ckpt")
    assert tuple(model.guidance.interval) == (0.3, float("inf"))


def test_a_class_by_number_is_drawn_while_training(call: Call) -> None:
    labels = [
        "conditioner=labels",
        "conditioner.num_classes=4",
        "conditioner.class_names=null",
        "network.c_embed_dim=4",
    ]
    folder = call(
        "train.py", *TINY, *labels, "callbacks=default", "callbacks.drawn.prompts=[0,1]", "trainer.max_steps=1"
    )
    assert list((folder / "samples").glob("*.png"))


def test_ckpt_goes_on_in_another_folder(call: Call, tmp_path: Path) -> None:
    first = call("train.py", *TINY, "trainer.max_steps=3", folder=tmp_path / "first")
    last = first / "checkpoints" / "last.ckpt"
    second = call("train.py", *TINY, "trainer.max_steps=4", f"ckpt={last}", folder=tmp_path / "second")
    assert checkpoint.read(second / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert checkpoint.read(last)["global_step"] == 3


@pytest.mark.parametrize("limits", [["trainer.max_steps=3"], ["trainer.max_steps=-1", "trainer.max_epochs=1"]])
def test_ckpt_at_the_limit_is_refused(
    limits: list[str], call: Call, refused: Callable[..., str], tmp_path: Path
) -> None:
    quick = [*TINY, "callbacks=fit", *limits]
    last = call("train.py", *quick, folder=tmp_path / "first") / "checkpoints" / "last.ckpt"
    sentence = refused("train.py", *quick, f"ckpt={last}", folder=tmp_path / "second")
    assert f"{last} is at step {'3 after 0' if len(limits) == 1 else '8 after 1'} epochs" in sentence
    assert f"{limits[-1]} leaves nothing to train" in sentence
    assert not (tmp_path / "second" / "result.json").exists()


def test_a_run_that_began_from_ckpt_goes_on_with_the_same_command_and_with_no_other_ckpt(
    call: Call,
    refused: Callable[..., str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    quick = [*TINY, "callbacks=fit"]
    first = call("train.py", *quick, "trainer.max_steps=2", folder=tmp_path / "first") / "checkpoints" / "last.ckpt"
    begin = [*quick, "ckpt=first/checkpoints/last.ckpt"]
    own = call("train.py", *begin, "trainer.max_steps=3", folder=tmp_path / "own") / "checkpoints" / "last.ckpt"
    # As a kill leaves it; where it began may be gone by now.
    (tmp_path / "own" / "result.json").unlink()
    first.rename(tmp_path / "other.ckpt")
    for more, steps in ((begin, 4), (quick, 5), ([*quick, f"ckpt={first}"], 6), ([*quick, f"ckpt={own}"], 7)):
        capfd.readouterr()
        call("train.py", *more, f"trainer.max_steps={steps}", folder=tmp_path / "own")
        assert f"goes on from  {own}" in capfd.readouterr().out
        assert checkpoint.read(own)["global_step"] == steps
        assert checkpoint.read(own)["config"]["ckpt"] == str(first)
    before = own.read_bytes()
    for other in (tmp_path / "other.ckpt", own.with_name("previous.ckpt"), tmp_path / "absent.ckpt"):
        sentence = refused("train.py", *quick, "trainer.max_steps=9", f"ckpt={other}", folder=tmp_path / "own")
        assert f"{tmp_path / 'own'} holds a run that began from {first} and" in sentence
        assert f"not from ckpt={other}" in sentence
        assert "another hydra.run.dir" in sentence
    assert own.read_bytes() == before
    # A run that began from nothing, too.
    first.parent.parent.joinpath("result.json").unlink()
    (tmp_path / "other.ckpt").rename(first)
    sentence = refused("train.py", *quick, "trainer.max_steps=9", f"ckpt={own}", folder=tmp_path / "first")
    assert "began from nothing and" in sentence


@pytest.mark.parametrize("scheduler", ["plateau", "warmup_cosine"])
def test_a_rate_that_is_changed_holds_from_the_checkpoint_on(scheduler: str, call: Call, tmp_path: Path) -> None:
    quick = [*TINY, "callbacks=fit", f"scheduler={scheduler}"]
    first = call("train.py", *quick, "trainer.max_steps=4", folder=tmp_path / "first")
    last = first / "checkpoints" / "last.ckpt"
    for folder, rate, steps, more in (
        (first, 0.0003, 6, []),
        (tmp_path / "second", 0.00003, 8, [f"ckpt={last}"]),
    ):
        changed = [f"trainer.max_steps={steps}", f"optimizer.lr={rate}", "+optimizer.weight_decay=0.1"]
        call("train.py", *quick, *changed, *more, folder=folder)
        saved = checkpoint.read(folder / "checkpoints" / "last.ckpt")
        (group,), (schedule,) = saved["optimizer_states"][0]["param_groups"], saved["lr_schedulers"]
        assert group["weight_decay"] == 0.1
        if scheduler == "warmup_cosine":  # the place in the schedule is kept
            assert group["initial_lr"] == rate
            assert schedule["base_lrs"] == [rate]
        assert group["lr"] == pytest.approx(rate if scheduler == "plateau" else rate * (steps + 1) / 100)


def test_another_schedule_begins_anew_from_a_checkpoint(call: Call, tmp_path: Path) -> None:
    quick, last = [*TINY, "callbacks=fit"], "checkpoints/last.ckpt"
    first = call("train.py", *quick, "scheduler=plateau", "trainer.max_steps=2", folder=tmp_path / "first")
    begin = [*quick, "trainer.max_steps=4", f"ckpt={first / last}"]
    other = call("train.py", *begin, "scheduler=warmup_cosine", folder=tmp_path / "other")
    (schedule,) = checkpoint.read(other / last)["lr_schedulers"]
    assert schedule["last_epoch"] == 2
    patient = call("train.py", *begin, "scheduler=plateau", "scheduler.patience=7", folder=tmp_path / "patient")
    (schedule,) = checkpoint.read(patient / last)["lr_schedulers"]
    assert schedule["patience"] == 7


def test_a_folder_goes_on_with_what_it_trains_and_with_other_limits(
    call: Call, refused: Callable[..., str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    quick = [*TINY, "callbacks=fit", "schedule=cosine"]
    folder = call("train.py", *quick, "trainer.max_steps=2")
    last = folder / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    for word, says in {
        "seed=1": "seed = 0 there and 1 here",
        "loss=huber": "module.denoiser.loss = mse there and huber here",
        "weighting=min_snr": "module.denoiser.weighting",
        "data.batch_size=4": "data.batch_size = 8 there and 4 here",
        "trainer.accumulate_grad_batches=2": "images per step = 8 there and 16 here",
        "module.drop_prob=0.2": "module.drop_prob = 0.1 there and 0.2 here",
        "scheduler=plateau": "module.scheduler",
    }.items():
        sentence = refused("train.py", *quick, "trainer.max_steps=4", word)
        assert f"{folder} holds a run with other settings: " in sentence
        assert says in sentence
        assert "another hydra.run.dir" in sentence
        assert last.read_bytes() == before
    free = ["trainer.gradient_clip_val=0.5", "trainer.log_every_n_steps=1", "callbacks.last.every_n_steps=1"]
    free += ["data.val_batch_size=4", "guidance.weight=2", "sampler=ddpm", "logger=none"]
    # The same number of images in a step, as on other devices.
    free += ["trainer.accumulate_grad_batches=2", "data.batch_size=4"]
    call("train.py", *quick, "trainer.max_steps=4", *free)
    assert checkpoint.read(last)["global_step"] == 4


def test_a_run_without_a_validation_ends_without_an_objective(
    call: Call, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [*TINY, "callbacks=default", "callbacks.samples=null", "trainer.max_steps=2", "trainer.limit_val_batches=0"]
    folder = call("train.py", *words)
    assert "val/loss = null, as trainer.limit_val_batches=0 leaves out the validation" in capfd.readouterr().out
    record = json.loads((folder / "result.json").read_text())
    assert (record["metric"], record["objective"], record["steps"]) == ("val/loss", None, 2)
    call("train.py", *words)
    assert "is finished: 2 steps, 1 epochs, val/loss = null. " in capfd.readouterr().out
    other = call("train.py", *words, "objective=train/loss_step", folder=tmp_path / "other")
    assert json.loads((other / "result.json").read_text())["objective"] > 0


@pytest.mark.parametrize("word", ["~callbacks.samples", "callbacks.samples=null"])
def test_the_others_draw_without_the_samples(call: Call, word: str) -> None:
    words = [*TINY, "data.n_train=16", "data.n_val=4", "trainer.max_steps=2", "trainer.check_val_every_n_epoch=1"]
    words += ["callbacks.clip.every_n_epochs=1", "callbacks.embeddings.every_n_epochs=1"]
    folder = call("train.py", *words, word)
    assert not (folder / "samples").exists()
    assert any(row["val/clip_score"] for row in rows(folder))
    # The demo's four prompts at its two weights.
    assert len(list((folder / "embeddings" / "step-000002").glob("*.png"))) == 8


@pytest.mark.parametrize("epochs", [3, 4])
def test_the_objective_is_of_the_last_weights_whether_or_not_it_was_due(call: Call, epochs: int) -> None:
    words = [*TINY, "data.n_train=16", "data.n_val=4", "trainer.max_steps=-1", f"trainer.max_epochs={epochs}"]
    words += ["trainer.check_val_every_n_epoch=1", "callbacks.clip.every_n_epochs=2", "callbacks.samples.gif=never"]
    words += ["callbacks.embeddings=null", "objective=val/clip_score", "callbacks.samples.weights=[1.0]"]
    folder = call("train.py", *words)
    objective = json.loads((folder / "result.json").read_text())["objective"]
    logged = [float(row["val/clip_score"]) for row in rows(folder) if row["val/clip_score"]]
    assert len(logged) == epochs // 2
    assert (logged[-1] == pytest.approx(objective, abs=1e-6)) == (epochs == 4)
    # As after a kill before it was written.
    (folder / "result.json").unlink()
    call("train.py", *words)
    assert json.loads((folder / "result.json").read_text())["objective"] == objective


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_command(command: Run, tmp_path: Path) -> None:
    overrides = [*TINY, "trainer.max_steps=24", "callbacks.last.every_n_steps=1", "callbacks.last.share=1.0"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command("train.py", *overrides, f"hydra.run.dir={whole}").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "train.py", *overrides, f"hydra.run.dir={broken}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    last = broken / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists()
    assert not (broken / "result.json").exists()
    assert command("train.py", *overrides, f"hydra.run.dir={broken}").returncode == 0
    one, other = (checkpoint.read(folder / "checkpoints" / "last.ckpt") for folder in (whole, broken))
    assert one["global_step"] == other["global_step"] == 24
    for key, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][key]), key
    assert [row["step"] for row in rows(whole)] == [row["step"] for row in rows(broken)]


def test_a_sweep_returns_one_objective_per_job(command: Run, tmp_path: Path) -> None:
    done = command(
        "train.py",
        "-m",
        *TINY,
        "trainer.max_steps=2",
        "optimizer.lr=0.001,0.002",
        f"hydra.sweep.dir={tmp_path}",
        "callbacks=fit",
    )
    assert done.returncode == 0, done.stderr
    values = [json.loads((tmp_path / job / "result.json").read_text())["objective"] for job in ("0", "1")]
    assert values[0] != values[1]


# What is missing on a machine without a hub is given by hand; everything else is the experiment's own.
EMBEDDED = [
    "conditioner.model=anther-flowers-32",
    "conditioner.pretrained=embedded",
    "network.c_embed_dim=64",
    "callbacks.clip.model=anther-flowers-32",
    "callbacks.clip.pretrained=embedded",
]
MNIST = ("mnist", "mnist_class", "mnist_classifier", "mnist_idk")
FETCHED = {"flowers210": "flowers210"} | dict.fromkeys(MNIST, "mnist/train-images")  # data that the package index has
# Their data are large or not to be fetched: drawn flowers of a few pixels take their place here, and their own data
# modules are composed in test_unconditional_data.py.
DRAWN = ["data=embedded", "data.n_train=8", "data.n_val=4", "data.batch_size=4"]
SMALL_ADM = [*DRAWN, "data.size=16", "network.channels=32", "network.head_channels=32"]
STAND_INS = {
    "flowers102": SMALL_ADM,
    "celeba": SMALL_ADM,
    "cifar10": SMALL_ADM,
    "flowers102_seed004": [*DRAWN, "data.size=16", "network.dim=16"],
    # Eight images have no FID: test_fid_while_training.
    "flowers102_small": [*DRAWN, "data.size=16", "network.dim=16", "callbacks=default"],
    "vae_flowers102": [*DRAWN, "data.size=16"],
    "autoencoder_kl": [*DRAWN, "data.size=16", "network.channels=32"],
    "flowers": [*EMBEDDED, "data.batch_size=2"],
    "flowers_seed001": [*EMBEDDED, "data.batch_size=2"],
    "flowers_course": [*EMBEDDED, "data.batch_size=2"],
    "demo": ["data.n_train=64", "data.n_val=16"],
    "mnist_idk": ["data.judges={folds: 2, epochs: 1, batch_size: 512}"],
    "clip_flowers": ["data.n_train=256", "data.n_val=64", "data.val_batch_size=64", "data.batch_size=64"],
}


# Of the three published networks for flowers one is enough for the default suite.
SLOW = {*FETCHED, "flowers_seed001", "flowers_course"}


@pytest.mark.parametrize(
    "experiment", [pytest.param(e, marks=pytest.mark.slow if e in SLOW else ()) for e in EXPERIMENTS]
)
def test_every_experiment_runs_one_batch(experiment: str, call: Call, photos: Path, tmp_path: Path) -> None:
    overrides = [f"experiment={experiment}", "debug=fdr", "trainer.accelerator=cpu", *STAND_INS.get(experiment, [])]
    if experiment != "clip_flowers":
        overrides += ["sampler.steps=2"]
    if experiment.startswith("flowers") and experiment not in FETCHED and DRAWN[0] not in overrides:
        overrides += [f"data.path={photos}", "data.split={train: 0.75, val: 0.25}"]
    if experiment == "flowers_small":
        names = [str(path.relative_to(photos)) for path in sorted(photos.rglob("*.jpg"))]
        table = np.random.default_rng(0).normal(size=(len(names), 512)).astype(np.float32)
        np.savez(tmp_path / "clip.npz", path=names, embedding=table)
        overrides += [f"conditioner.path={tmp_path / 'clip.npz'}", "data.batch_size=2"]
    if experiment in FETCHED:
        try:
            resolve(FETCHED[experiment])
        except AssetError as error:
            pytest.skip(str(error))
        overrides += ["data.batch_size=4", "data.val_batch_size=4"]
    folder = call("train.py", *overrides)
    assert not (folder / "checkpoints").exists()
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_fid_while_training(call: Call) -> None:
    try:
        resolve("fid_inception")
    except AssetError as error:
        pytest.skip(str(error))
    drawn = ["data=embedded", "data.n_train=60", "data.n_val=10", "data.batch_size=20", "data.size=16"]
    few = ["callbacks.fid.num_images=50", "callbacks.fid.every_n_epochs=1", "trainer.check_val_every_n_epoch=1"]
    quick = ["network.dim=16", "sampler.steps=2", "trainer.max_steps=3", "trainer.accelerator=cpu"]
    folder = call("train.py", "experiment=flowers102_small", *drawn, *few, *quick)
    (best,) = (folder / "checkpoints").glob("best_fid-*.ckpt")
    logged = float(rows(folder)[-1]["val/fid_50"])
    assert f"{logged:.2f}" in best.name
    assert logged > 0


@pytest.mark.parametrize(
    "network", [["adm", "network.channels=32", "network.head_channels=32"], ["convnext_unet", "network.dim=16"]]
)
def test_the_demo_trains_with_the_other_networks(network: list[str], call: Call) -> None:
    size = ["data.n_train=16", "data.n_val=8", "data.batch_size=8", "data.size=32", "network.c_embed_dim=64"]
    quick = [
        "sampler.steps=2",
        "trainer.accelerator=cpu",
        "trainer.max_steps=2",
        "callbacks.embeddings.every_n_epochs=1",
    ]
    few = ["callbacks.samples.prompts=[a red rose]", "callbacks.samples.gif=never", "callbacks.clip=null"]
    chosen = ["experiment=demo", f"network={network[0]}", *network[1:], *size, *quick, *few, "callbacks.best_clip=null"]
    folder = call("train.py", *chosen, "trainer.check_val_every_n_epoch=1")
    model = load_model(folder / "checkpoints" / "last.ckpt")
    drawn = [model.sample(["a red rose"], [0], weight) for weight in (0.0, 3.0)]
    assert not torch.equal(*drawn)
    (rows,) = [np.load(path)["embeddings"] for path in sorted((folder / "embeddings").glob("*.npz"))[-1:]]
    assert rows.shape == (2, 64)  # an image per weight


def test_help_needs_no_torch_and_lists_every_experiment(command: Run) -> None:
    for script in ("train.py", "sample.py", "analyze.py"):
        code = (
            "import runpy, sys; sys.argv = [sys.argv[1], '--help']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "finally: assert not {'torch', 'lightning', 'open_clip'} & set(sys.modules), 'imported too much'"
        )
        done = command("-c", code, script)
        assert done.returncode == 0, done.stderr
        assert "hydra.run.dir" in done.stdout or script == "sample.py"
        if script == "train.py":
            described = done.stdout.split("Overrides that people use")[0]
            assert all(f"\n  {name} " in described for name in EXPERIMENTS)


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "analyze.py"])
def test_help_lists_the_groups_that_the_command_takes(script: str, command: Run) -> None:
    listed = re.findall(r"^([\w@.]+): \w+(?:, \w+)+$", command(script, "--help").stdout, re.MULTILINE)
    refusal = command(script, "protocol=mnist" if script == "train.py" else "network=flowers").stderr
    taken = refusal.partition("choose from ")[2].strip().rstrip(".").split(", ")
    assert listed == [group for group in taken if group != "local"]  # a machine's own, of which there are none here
    assert listed == {"sample.py": ["sampler", "trainer"]}.get(script, listed)


@pytest.mark.parametrize("debug", ["default", "limit", "overfit", "profiler"])
def test_debug_configs_run(debug: str, call: Call, capfd: pytest.CaptureFixture[str]) -> None:
    fewer = {"overfit": ["trainer.max_epochs=3"], "profiler": ["trainer.max_steps=3"]}.get(debug, [])
    folder = call("train.py", *TINY, "callbacks=fit", f"debug={debug}", *fewer)
    steps = json.loads((folder / "result.json").read_text())["steps"]
    assert steps == {"default": 8, "limit": 6, "overfit": 6, "profiler": 3}[debug]
    if debug == "profiler":
        rows = (folder / "profile" / "fit-profile.txt").read_text().splitlines()
        table = [re.split(r"\s{2,}", row.strip()) for row in rows if "%" in row][1:]  # some names hold a space
        named, shares = [row[0] for row in table], [float(row[1].rstrip("%")) for row in table]
        assert len(named) == 10
        assert all(re.match(r"(aten|autograd)::", name) for name in named), named
        assert "aten::convolution_backward" in named
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 100.1


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "none"])
def test_loggers_beside_the_csv_file(logger: str, call: Call, capfd: pytest.CaptureFixture[str]) -> None:
    folder = call("train.py", *TINY, "callbacks=fit", "trainer.max_steps=2", f"logger={logger}")
    printed = "".join(capfd.readouterr())
    assert (folder / "logs" / "metrics.csv").exists() == (logger != "none")
    assert bool(list(folder.rglob("events.out.tfevents*"))) == (logger == "tensorboard")
    assert bool(list(folder.rglob("run-*.wandb"))) == (logger == "wandb")
    assert ("offline" in printed) == (logger == "wandb")


def test_the_non_leaking_augmentation_trains_and_draws(call: Call) -> None:
    augmented = ["augment@data.augment=nonleaking", "module.augment_dim=7", "network.c_embed_dim=71"]
    folder = call("train.py", *TINY, *augmented, "trainer.max_steps=2")
    call("sample.py", f"ckpt={folder}/checkpoints/last.ckpt", "prompts=[a red rose]", folder=folder / "drawn")
    assert (folder / "drawn" / "grid.png").exists()
