"""evaluate.py as a person runs it."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from urllib.request import urlopen

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

import evaluate
from diffusion import checkpoint, cli
from diffusion.assets import AssetError, resolve
from diffusion.build import build
from diffusion.curation import brain, dataset
from diffusion.errors import AntherError
from diffusion.evaluation import clip_score, run, scoring, subject
from diffusion.images import to_uint8
from diffusion.samplers import DDIM
from diffusion.sweeps import failure
from tests.diffusion.curation.hub_server import running_hub

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "prompts=[a red rose,two white daisies,a yellow sunflower]"
QUICK = [
    PROMPTS,
    "num_images=8",
    "sampler=ddim",
    "sampler.steps=2",
    "batch_size=3",
    "clip.model=anther-flowers-32",
    "clip.pretrained=embedded",
    "nearest.space=pixels",
    "inception=null",
    "dataset=null",
]

Call = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same in any way to the same images; metrics.json knows when it was made."""
    files = [*sorted((folder / "images").iterdir()), folder / "records.parquet", folder / "embeddings.npy"]
    return {path.name: path.read_bytes() for path in files}


def metrics(folder: Path) -> dict[str, object]:
    """All of metrics.json but when it was made, and how long that took."""
    document = json.loads((folder / "metrics.json").read_text())
    del document["run"]["made"], document["run"]["seconds"]
    return dict(document)


@pytest.fixture(scope="module")
def evaluated(trained: Path, command: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    done = command("evaluate.py", f"ckpt={trained}", *QUICK, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    assert str(folder / "report.html") in done.stdout
    return folder


def test_a_run_leaves_everything_it_promises(evaluated: Path, trained: Path) -> None:
    frame = pd.read_parquet(evaluated / "records.parquet")
    assert list(frame["id"]) == [f"{k:06d}" for k in range(8)]
    assert list(frame["seed"]) == list(range(8))
    assert list(frame["prompt"][:4]) == ["a red rose", "two white daisies", "a yellow sunflower", "a red rose"]
    assert list(frame["label"][:3]) == ["rose", "daisy", "sunflower"]
    assert all(Image.open(evaluated / file).size == (32, 32) for file in frame["file"])
    assert np.load(evaluated / "embeddings.npy").shape == (8, 32)
    columns = {"clip_score", "nearest_distance", "nearest_real", "uniqueness", "representativeness_closeness"}
    assert columns <= set(frame.columns)
    for name in ("metrics.csv", "report.html", "protocol.json", "plots/grid.png", "plots/nearest.png"):
        assert (evaluated / name).stat().st_size > 0
    assert len(list((evaluated / "imagefolder").rglob("*.png"))) == 8
    document = json.loads((evaluated / "metrics.json").read_text())
    run = document["run"]
    assert run["checkpoint"] == str(trained)
    assert run["guidance_weight"] == 1.0
    assert run["steps"] == 2
    libraries = {"torch", "open_clip_torch", "torch-fidelity", "fiftyone", "fiftyone-brain", "scikit-learn"}
    assert run["versions"].keys() >= libraries
    score = document["metrics"]["clip_score_8/anther-flowers-32/embedded"]
    assert score["value"] == pytest.approx(frame["clip_score"].mean())
    assert "conditions the model" in score["note"]
    assert {"diversity_8", "diversity_pairs_8", "uniqueness_8", "nearest_distance_8"} <= set(document["metrics"])
    made_by = json.loads((evaluated / "protocol.json").read_text())
    assert {"seed", "guidance_weight", "sampler", "steps"} <= set(made_by)
    for key, metric in document["metrics"].items():
        assert "8" in key
        assert metric["protocol"]["N"] == 8
        assert made_by.items() <= metric["protocol"].items(), key
    for name in ("uniqueness", "representativeness_closeness"):
        assert document["metrics"][f"{name}_8"]["protocol"]["definition"] == brain.DEFINITIONS[name]
    assert run["data_digest"] == document["metrics"]["nearest_distance_8"]["protocol"]["data_digest"]


def test_the_same_command_again_changes_nothing(evaluated: Path, trained: Path, command: Run) -> None:
    before, metrics = contents(evaluated), (evaluated / "metrics.json").read_bytes()
    done = command("evaluate.py", f"ckpt={trained}", *QUICK, f"hydra.run.dir={evaluated}")
    assert done.returncode == 0, done.stderr
    assert contents(evaluated) == before
    assert (evaluated / "metrics.json").read_bytes() == metrics


def test_scored_anew_by_other_metrics_nothing_is_left_of_the_first_ones(
    evaluated: Path, trained: Path, call: Call, tmp_path: Path
) -> None:
    folder = shutil.copytree(evaluated, tmp_path / "run")
    call("evaluate.py", f"ckpt={trained}", *QUICK, "nearest=null", folder=folder)
    frame = pd.read_parquet(folder / "records.parquet")
    assert "clip_score" in frame
    assert not [name for name in frame if name.startswith("nearest")]
    assert not [key for key in metrics(folder)["metrics"] if key.startswith("nearest")]  # type: ignore[attr-defined]
    assert contents(folder)["000003.png"] == contents(evaluated)["000003.png"]


def test_records_that_are_damaged_are_made_anew_with_every_score(
    evaluated: Path, trained: Path, call: Call, refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = shutil.copytree(evaluated, tmp_path / "run")
    (folder / "records.parquet").write_bytes(b"damaged")
    assert "delete it and run evaluate.py again" in refused("evaluate.py", f"ckpt={trained}", *QUICK, folder=folder)
    (folder / "records.parquet").unlink()
    call("evaluate.py", f"ckpt={trained}", *QUICK, folder=folder)
    assert set(pd.read_parquet(folder / "records.parquet")) == set(pd.read_parquet(evaluated / "records.parquet"))
    assert metrics(folder)["metrics"].keys() == metrics(evaluated)["metrics"].keys()  # type: ignore[attr-defined]
    seconds = [json.loads((path / "metrics.json").read_text())["run"]["seconds"] for path in (folder, evaluated)]
    assert seconds[0] == seconds[1]
    assert "clip_score" in (folder / "report.html").read_text()


def test_a_scoring_that_is_broken_off_leaves_no_records_beside_metrics_of_others(
    evaluated: Path, trained: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(evaluated, tmp_path / "run")
    before = (folder / "metrics.json").read_bytes()

    def broken(*args: object) -> None:
        raise ZeroDivisionError

    # Before anything is written all stays as it was.
    with monkeypatch.context() as patch:
        patch.setattr(scoring.Scorers, "score", broken)
        with pytest.raises(ZeroDivisionError):
            call("evaluate.py", f"ckpt={trained}", *QUICK, "nearest=null", folder=folder)
    assert (folder / "metrics.json").read_bytes() == before
    assert contents(folder) == contents(evaluated)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_metrics", broken)
        with pytest.raises(ZeroDivisionError):
            call("evaluate.py", f"ckpt={trained}", *QUICK, "nearest=null", folder=folder)
    assert "nearest_distance" not in pd.read_parquet(folder / "records.parquet")
    call("evaluate.py", f"ckpt={trained}", *QUICK, folder=folder)
    assert set(pd.read_parquet(folder / "records.parquet")) == set(pd.read_parquet(evaluated / "records.parquet"))


def test_images_of_another_precision_do_not_go_on_in_a_folder(
    evaluated: Path, trained: Path, call: Call, refused: Callable[..., str], tmp_path: Path
) -> None:
    sentence = refused("evaluate.py", f"ckpt={trained}", *QUICK, "trainer.precision=bf16-mixed", folder=evaluated)
    assert "precision" in sentence
    folder = call("evaluate.py", f"ckpt={trained}", *QUICK, "trainer.precision=bf16-mixed", "num_images=2")
    assert metrics(folder)["run"]["precision"] == "bf16-mixed"  # type: ignore[index]
    assert json.loads((folder / "protocol.json").read_text())["precision"] == "bf16-mixed"


def test_scores_are_of_the_files(evaluated: Path) -> None:
    scorer = scoring.load_clip_scorer("anther-flowers-32", "embedded", "cpu")
    frame = pd.read_parquet(evaluated / "records.parquet")
    for row in (0, 5):
        pixels = torch.from_numpy(np.asarray(Image.open(evaluated / frame["file"][row])).copy()).permute(2, 0, 1)
        score = scorer.score(pixels[None].float() / 127.5 - 1, [frame["prompt"][row]])
        assert frame["clip_score"][row] == pytest.approx(score.item(), abs=1e-6)


def test_the_nearest_image_is_the_nearest(evaluated: Path, trained: Path) -> None:
    config = checkpoint.read(trained)["config"]
    data = subject.load_data(config)
    train = data.pixels("train").flatten(1).double() / 255
    frame = pd.read_parquet(evaluated / "records.parquet")
    for row in range(8):
        ours = torch.from_numpy(np.asarray(Image.open(evaluated / frame["file"][row])).copy()).permute(2, 0, 1)
        distances = (train - ours.flatten().double() / 255).norm(dim=1)
        assert frame["nearest_distance"][row] == pytest.approx(distances.min().item(), rel=1e-5)
        assert frame["nearest_real"][row] == data.table.names[data.splits["train"][distances.argmin()]]


def test_weights_from_elsewhere_with_a_config_draw_the_same(
    trained: Path, evaluated: Path, call: Call, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint.read(trained)
    bare = evaluated.parent / "bare.pth"
    # As torch.compile and torch.save leave it.
    torch.save(
        {f"_orig_mod.{key}": value for key, value in saved["ema"]["network"].items()}
        if "ema" in saved
        else {
            f"_orig_mod.{key.removeprefix('denoiser.network.')}": value for key, value in saved["state_dict"].items()
        },
        bare,
    )
    described_by = evaluated.parent / "bare.yaml"
    config = (trained.parents[1] / ".hydra" / "config.yaml").read_text()
    described_by.write_text(f"{config}guided_elsewhere: never so\n")
    folder = call("evaluate.py", f"ckpt={bare}", f"model={described_by}", *QUICK, "nearest=null", "clip=null")
    assert "caution   never so" in capfd.readouterr().out
    assert metrics(folder)["run"]["caution"] == "never so"  # type: ignore[index]
    assert "guidance.weight=0" in subject.described("flowers_course")["guided_elsewhere"]
    for path in (evaluated / "images").iterdir():
        there, here = (np.asarray(Image.open(p), dtype=int) for p in (path, folder / "images" / path.name))
        # One process has one thread and the other as many as there are: equal to the rounding of sums.
        assert np.abs(there - here).max() <= 1


def test_weights_from_elsewhere_described_by_an_experiment(
    call: Call, refused: Callable[..., str], tmp_path: Path
) -> None:
    # Without Hydra, as a rank that others started has it.
    config = subject.described("mnist")
    model = build(config["module"]).eval()
    network = model.denoiser.network
    torch.save(network.state_dict(), tmp_path / "theirs.pth")
    quick = ["num_images=2", "sampler=ddim", "sampler.steps=2", "clip=null", "nearest=null", "inception=null"]
    folder = call("evaluate.py", f"ckpt={tmp_path / 'theirs.pth'}", "model=mnist", *quick, "dataset=null")
    run = json.loads((folder / "metrics.json").read_text())["run"]
    assert (run["experiment"], run["T"], run["image_shape"]) == ("mnist", 300, [1, 28, 28])
    assert run["parameters"] == sum(p.numel() for p in network.parameters())
    drawn = model.sample(None, [0, 1], sampler=DDIM(steps=2, clip=True))
    files = [np.asarray(Image.open(folder / f"images/00000{k}.png"), dtype=int) for k in (0, 1)]
    assert np.abs(np.stack(files) - to_uint8(drawn)[:, 0].numpy()).max() <= 1
    # What describes the weights is part of what the images are.
    config["module"]["denoiser"]["schedule"] = {"_target_": "diffusion.schedules.Cosine", "T": 300}
    (tmp_path / "other.yaml").write_text(json.dumps(config))
    words = [f"ckpt={tmp_path / 'theirs.pth'}", f"model={tmp_path / 'other.yaml'}", *quick, "dataset=null"]
    assert "model_config_sha256" in refused("evaluate.py", *words, folder=folder)


def test_the_models_own_sampler_and_weight_are_the_default(trained: Path, call: Call) -> None:
    quick = [word for word in QUICK if not word.startswith(("sampler", "num_images"))]
    folder = call("evaluate.py", f"ckpt={trained}", *quick, "num_images=2", "clip=null", "nearest=null")
    run = json.loads((folder / "metrics.json").read_text())["run"]
    config = checkpoint.read(trained)["config"]
    assert run["sampler"] == config["module"]["sampler"]
    assert run["steps"] == config["module"]["sampler"]["steps"] == 30
    assert run["guidance_weight"] == config["guidance"]["weight"]


def test_a_sweep_ends_with_one_table_and_one_picture(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    loads: list[str] = []

    def count(module: ModuleType, name: str) -> None:
        load = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: loads.append(name) or load(*args))

    count(subject, "load_model")
    count(checkpoint, "load_model")  # of what guidance leads away from
    count(subject, "rebuild")  # of data
    count(clip_score, "ClipScore")
    for cached in (subject._load, subject._build_data, scoring.load_clip_scorer, checkpoint._load_worse):
        cached.cache_clear()
    sweep = tmp_path / "sweep"
    overrides = [
        f"ckpt={trained}",
        *QUICK,
        "objective=clip_score",
        "guidance.weight=0,2,10",
        f"guidance.bad={trained}",
        f"hydra.sweep.dir={sweep}",
    ]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "evaluate.py"), "-m", *overrides])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    cli.run(evaluate.main)
    assert sorted(loads) == ["ClipScore", "load_model", "load_model", "rebuild"]
    table = pd.read_csv(sweep / "sweep.csv")
    assert list(table["guidance.weight"]) == [0, 2, 10]
    assert (sweep / "sweep.png").stat().st_size > 0
    weights = [json.loads((sweep / str(k) / "metrics.json").read_text())["run"]["guidance_weight"] for k in range(3)]
    assert weights == [0, 2, 10]
    assert "best" in capfd.readouterr().out


def test_a_sweep_over_other_values_in_the_same_folder_reports_none_of_the_numbers_before(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["num_images=2", "clip=null", "nearest=null", "embedding=null"]

    def sweep(weights: str) -> dict[int, bool]:
        """By weight, whether it has numbers."""
        words = [f"ckpt={trained}", *QUICK, *few, f"guidance.weight={weights}", f"hydra.sweep.dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "evaluate.py"), "-m", *words])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        with suppress(SystemExit):
            cli.run(evaluate.main)
        table = pd.read_csv(tmp_path / "sweep.csv")
        return dict(zip(table["guidance.weight"], table["diversity_2"].notna(), strict=True))

    assert sweep("0,1") == {0: True, 1: True}
    assert sweep("0,7") == {0: True, 7: False}
    said = capfd.readouterr().err
    assert "other settings" in said
    assert "another hydra.sweep.dir" in said
    # Of job 1, which is not tried this time, the folder says 7 and holds the numbers of 1.
    assert sweep("0") == {0: True, 7: False}
    assert sweep("0,1") == {0: True, 1: True}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["ckpt=nowhere.ckpt"], "nowhere.ckpt"),
        (["prompts=nothing_shipped"], "nothing_shipped"),
        (["prompts=[a steam engine]"], "steam"),
        (["num_images=0"], "num_images"),
        (
            ["inception={weights: null, split: val, few_images: refuse, one_channel: refuse, missing: refuse}"],
            "too few",
        ),
        (["nearest.split=dev"], "dev"),
        (["nearest.space=inception"], "nearest.space=pixels"),
        (["embedding.layer=dwn2"], "down2"),
        (["publish.repo_id=me/flowers"], "dataset=null"),
        (["app=true"], "dataset=null"),
        (["network=flowers"], "network"),
        (["data.path=/nowhere"], "data.path"),
        (["model=flowers"], "its own config"),
        (["guidance.interval=[3,1]"], "guidance.interval"),
        (["guidance.rescale=2"], "guidance.rescale"),
        (["guidance.bad=nowhere.ckpt"], "nowhere.ckpt"),
    ],
)
def test_bad_input(overrides: list[str], says: str, trained: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    assert says in refused("evaluate.py", f"ckpt={trained}", *QUICK, *overrides)
    assert not (tmp_path / "run" / "images").exists()


@pytest.mark.parametrize("module", ["pandas", "jinja2", "sklearn", "umap"])
def test_what_is_not_installed_is_missed_before_anything_is_drawn(
    module: str, trained: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == module else there(name, *more))
    assert f"evaluating needs {module}, which" in refused("evaluate.py", f"ckpt={trained}", *QUICK)
    assert not (tmp_path / "run" / "protocol.json").exists()


@pytest.mark.parametrize("asked", [None, "theirs"])
def test_the_database_is_asked_before_anything_is_drawn(
    asked: str | None, trained: Path, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(folder: Path, name: str | None) -> None:
        raise AntherError(f"no place for {name}.")

    monkeypatch.setattr(dataset, "name_for", taken)
    quick = [word for word in QUICK if word != "dataset=null"]
    named = [] if asked is None else [f"dataset.name={asked}"]
    assert f"no place for {asked}" in refused("evaluate.py", f"ckpt={trained}", *quick, *named)
    assert not (tmp_path / "run" / "protocol.json").exists()


@pytest.fixture
def job_failures(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str | None]]:
    """Runs a sweep of two jobs, which fail before they draw, for want of a database at the latest; returns why."""

    def absent(*_: object) -> None:
        raise AntherError("no database.")

    def run(*overrides: str) -> list[str | None]:
        monkeypatch.setattr(dataset, "name_for", absent)
        sweep, quick = tmp_path / "sweep", [word for word in QUICK if word != "dataset=null"]
        words = ["-m", f"ckpt={trained}", *quick, *overrides, f"hydra.sweep.dir={sweep}"]
        monkeypatch.setattr(sys, "argv", [str(ROOT / "evaluate.py"), *words])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        with pytest.raises(SystemExit):
            cli.run(evaluate.main)
        assert not list(sweep.glob("*/protocol.json"))
        return [failure(sweep / str(k)) for k in range(2)]

    return run


def test_a_sweep_does_not_wait_in_the_app(job_failures: Callable[..., list[str | None]], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    for k, why in enumerate(job_failures("guidance.weight=0,2", "app=true")):
        assert why is not None
        assert why.startswith("app=true would hold the sweep")
        assert f"`python -m diffusion.curation.app {sweep / str(k)}`" in why
        assert f"`python -m diffusion.curation.gather {sweep} --name NAME`" in why


@pytest.mark.parametrize(
    "swept", [["guidance.weight=0,2"], ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "guidance.weight=0,2"]]
)
def test_a_sweep_does_not_send_all_jobs_to_one_repository(
    swept: list[str], job_failures: Callable[..., list[str | None]], tmp_path: Path
) -> None:
    for k, why in enumerate(job_failures(*swept, "publish.repo_id=me/flowers")):
        assert why is not None
        assert why.startswith("publish.repo_id=me/flowers is that of all jobs of the sweep")
        assert re.search(rf"`python evaluate.py .* hydra.run.dir={tmp_path / 'sweep' / str(k)} publish.*`\.$", why)


@pytest.mark.parametrize("repo", ["me/a,me/b", "me/flowers-${guidance.weight}"])
def test_a_sweep_may_have_a_repository_for_each_job(repo: str, job_failures: Callable[..., list[str | None]]) -> None:
    weights = "guidance.weight=2" if "," in repo else "guidance.weight=0,2"
    assert job_failures(weights, f"publish.repo_id={repo}") == ["no database."] * 2


def test_guidance_is_part_of_the_record(trained: Path, evaluated: Path, call: Call, tmp_path: Path) -> None:
    how = ["guidance.interval=[0.2,4]", "guidance.rescale=0.5", f"guidance.bad={trained}", "sampler=dpmpp_sde"]
    quick = [*QUICK, "nearest=null", "embedding=null", "num_images=2", "sampler.steps=2"]
    folder = call("evaluate.py", f"ckpt={trained}", *quick, *how)
    record = json.loads((folder / "protocol.json").read_text())
    assert record["guidance_interval"] == [0.2, 4.0]
    assert record["guidance_rescale"] == 0.5
    assert record["guidance_bad_sha256"] == record["checkpoint_sha256"]
    assert record["sampler"]["sde"] is True
    assert json.loads((folder / "metrics.json").read_text())["run"]["guidance_interval"] == [0.2, 4.0]
    # Where nothing is asked for, nothing is said: folders that were begun before these settings go on.
    before = json.loads((evaluated / "protocol.json").read_text())
    assert before["guidance_interval"] is before["guidance_rescale"] is before["guidance_bad_sha256"] is None
    assert before["guidance_negative"] is None


def test_a_negative_prompt_is_part_of_the_identity(
    trained: Path, call: Call, refused: Callable[..., str], tmp_path: Path
) -> None:
    quick = [f"ckpt={trained}", *QUICK, "nearest=null", "embedding=null", "num_images=2"]
    folder = call("evaluate.py", *quick, "guidance.negative=a white daisy")
    assert json.loads((folder / "protocol.json").read_text())["guidance_negative"] == "a white daisy"
    assert "away from “a white daisy”" in (folder / "report.html").read_text()
    for other in ([], ["guidance.negative=a red rose"]):
        said = refused("evaluate.py", *quick, *other, folder=folder)
        assert "guidance_negative = a white daisy there and" in said
    call("evaluate.py", *quick, "guidance.negative=a white daisy", folder=folder)


def test_a_folder_keeps_to_its_settings(evaluated: Path, trained: Path, refused: Callable[..., str]) -> None:
    before = contents(evaluated)
    said = refused("evaluate.py", f"ckpt={trained}", *QUICK, "guidance.negative=a white daisy", folder=evaluated)
    assert "guidance_negative" in said
    said = refused("evaluate.py", f"ckpt={trained}", *QUICK, "guidance.weight=5", folder=evaluated)
    assert "guidance_weight" in said
    assert "hydra.run.dir" in said
    assert contents(evaluated) == before


LONG = [*QUICK, "sampler.steps=20", "num_images=30"]
RANKS = ["trainer=ddp_sim", "trainer.devices=3"]


@pytest.fixture(scope="module")
def whole(trained: Path, command: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long evaluation in one process that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = command("evaluate.py", f"ckpt={trained}", *LONG, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[], RANKS], ids=["one process", "a rank of three"])
def test_a_killed_run_goes_on_to_the_same_bytes(ranks: list[str], trained: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    words = [sys.executable, "evaluate.py", f"ckpt={trained}", *LONG, *ranks, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)
    while process.poll() is None and len(list(folder.glob("parts/*.npz"))) < 3:
        time.sleep(0.02)
    everybody = psutil.Process(process.pid).children(recursive=True)
    if ranks:
        # The last one, which no other waits for before all have drawn.
        (victim,) = [child for child in everybody if child.environ().get("LOCAL_RANK") == "2"]
        victim.send_signal(signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert time.monotonic() - killed < 120
    assert psutil.wait_procs(everybody, timeout=60)[1] == []
    if ranks:
        assert process.returncode == 1
        assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1, err
        assert "the same command goes on" in err
    assert 0 < len(list(folder.glob("images/*.png"))) < 30
    assert not (folder / "records.parquet").exists()
    subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert contents(folder) == contents(whole)
    assert metrics(folder) == metrics(whole)


@pytest.mark.slow
def test_a_sweep_that_is_killed_in_its_second_job_ends_with_the_same_table(
    trained: Path, command: Run, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    few = ["num_images=12", "nearest=null", "embedding=null"]
    words = ["-m", f"ckpt={trained}", *LONG, *few, "guidance.weight=0,1"]
    done = command("evaluate.py", *words, f"hydra.sweep.dir={whole}")
    assert done.returncode == 0, done.stderr
    again = [sys.executable, "evaluate.py", *words, f"hydra.sweep.dir={killed}"]
    # With as many threads as `command` has, since sums are then rounded alike.
    with subprocess.Popen(again, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            while not list(killed.glob("1/images/*.png")) and process.poll() is None:
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    first = (killed / "0" / "metrics.json").read_bytes()
    assert 0 < len(list(killed.glob("1/images/*.png"))) < 12, "it was killed too late to show anything"
    assert not (killed / "sweep.csv").exists()
    done = command("evaluate.py", *words, f"hydra.sweep.dir={killed}")
    assert done.returncode == 0, done.stderr
    assert (killed / "0" / "metrics.json").read_bytes() == first
    # Of a process that has not drawn the first job the memory lies otherwise: equal to the rounding of sums.
    one, other = (pd.read_csv(sweep / "sweep.csv") for sweep in (whole, killed))
    assert list(other["guidance.weight"]) == [0, 1]
    pd.testing.assert_frame_equal(one, other, rtol=1e-3)
    for path in (whole / "1" / "images").iterdir():
        there, here = (np.asarray(Image.open(p), dtype=int) for p in (path, killed / "1" / "images" / path.name))
        assert np.abs(there - here).max() <= 1


@pytest.mark.slow
def test_three_ranks_make_the_same_files_and_the_same_numbers(trained: Path, evaluated: Path, tmp_path: Path) -> None:
    """Three chunks, of three, three and two images."""
    folder = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    words = [*torchrun, "evaluate.py", f"ckpt={trained}", *QUICK, *RANKS, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == contents(evaluated)
    assert metrics(folder) == metrics(evaluated)


@pytest.mark.slow
def test_a_sweep_on_two_ranks_has_each_jobs_weight(
    trained: Path, evaluated: Path, command: Run, tmp_path: Path
) -> None:
    words = [*QUICK, "guidance.weight=1,0", "trainer=ddp_sim", f"hydra.sweep.dir={tmp_path}/${{now:%f}}"]
    done = command("evaluate.py", "-m", f"ckpt={trained}", *words, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep,) = tmp_path.iterdir()
    # Two chunks are rank 0's and one is rank 1's; that of another weight would be another picture.
    assert contents(sweep / "0") == contents(evaluated)
    assert metrics(sweep / "0") == metrics(evaluated)
    assert contents(sweep / "1")["000003.png"] != contents(evaluated)["000003.png"]
    assert list(pd.read_csv(sweep / "sweep.csv")["guidance.weight"]) == [0, 1]
    assert (sweep / "sweep.png").stat().st_size > 0


@pytest.mark.slow
def test_the_whole_way_to_a_data_set_and_a_dry_run(trained: Path, command: Run, tmp_path: Path) -> None:
    environment = ["num_images=60", "inception.split=train", "inception.missing=leave_out"]
    quick = [word for word in QUICK if not word.startswith(("inception", "dataset", "num_images"))]
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "db"))
        patch.setenv("FIFTYONE_CONFIG_PATH", str(tmp_path / "fiftyone.json"))
        words = [f"ckpt={trained}", *quick, *environment, f"hydra.run.dir={folder}"]
        done = command("evaluate.py", *words, "publish.repo_id=me/flowers", "logger=wandb", timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        before = json.loads((folder / "dataset" / "metadata.json").read_text())["name"]
        renamed = command("evaluate.py", *words, "dataset.name=renamed", timeout=900)
        shown = browse(*words, "app=true")
    assert renamed.returncode == 0, renamed.stdout + renamed.stderr
    assert "'renamed'" in shown
    assert before == f"{folder.parent.name}-run"
    assert json.loads((folder / "dataset" / "metadata.json").read_text())["name"] == "renamed"
    samples = json.loads((folder / "dataset" / "samples.json").read_text())["samples"]
    assert len(samples) == 60
    fields = {"prompt", "clip_score", "unet_embedding", "uniqueness", "representativeness"}
    assert fields <= set(samples[0])
    assert "test/samples.json" in done.stdout
    assert "nothing was sent" in done.stdout
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    try:
        resolve("fid_inception")
    except AssetError:
        assert "left out" in metrics["fid_60"]["note"]
    else:
        assert metrics["fid_60"]["value"] > 0
        assert metrics["fid_60"]["protocol"]["reals"]
    assert list((folder / "logs" / "wandb").glob("offline-run-*"))


@pytest.mark.slow
def test_the_command_that_a_job_of_a_sweep_prints_sends_its_folder_alone(
    trained: Path, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, sweep = "hf_thisIsTheSecretOfTheTest", tmp_path / "sweep"
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "db"))
    monkeypatch.setenv("FIFTYONE_CONFIG_PATH", str(tmp_path / "fiftyone.json"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    quick = [word for word in QUICK if word not in ("dataset=null", "num_images=8")]
    words = [f"ckpt={trained}", *quick, "num_images=2", "nearest=null", "embedding=null", "logger=csv"]
    words += ["publish.repo_id=me/w${guidance.weight}", "sweep=guidance", f"hydra.sweep.dir={sweep}"]
    done = command("evaluate.py", *words)
    assert done.returncode == 0, done.stderr
    printed = [shlex.split(line.partition("To send it: ")[2]) for line in done.stdout.splitlines() if "To send" in line]
    assert len(printed) == 3
    _, script, *again = printed[1]
    assert not [word for word in again if word.startswith(("sweep", "logger"))]
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*") if path.parent.name in ("images", "logs")}
    assert before
    with running_hub(token, "me") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        done = command(script, *again)
    assert done.returncode == 0, done.stderr
    assert list(hub.repos) == ["me/w6.5"]
    assert [path.parent.name for path in sweep.rglob("published.json")] == ["1"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def browse(*words: str) -> str:
    """What evaluate.py says until it serves FiftyOne's App, whose page is there; Ctrl-C then ends it."""
    with subprocess.Popen(
        [sys.executable, "evaluate.py", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            said = ""
            for line in process.stdout or ():
                said += line
                if found := re.search(r"App shows .* at (http://localhost:\d+/\S+?)[;.]?\s", line):
                    break
            else:
                raise AssertionError(said)
            with urlopen(found[1], timeout=60) as page:
                assert b"<html" in page.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            process.kill()
    return said


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_curates_ends_in_the_same_data_set(
    trained: Path, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path / "db"))
    monkeypatch.setenv("FIFTYONE_CONFIG_PATH", str(tmp_path / "fiftyone.json"))
    words = [f"ckpt={trained}", *(word for word in QUICK if not word.startswith("dataset"))]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = command("evaluate.py", *words, f"hydra.run.dir={whole}")
    assert done.returncode == 0, done.stderr
    again = [sys.executable, "evaluate.py", *words, f"hydra.run.dir={killed}"]
    # With as many threads as `command` has, since sums are then rounded alike.
    with subprocess.Popen(again, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        try:
            # The page comes right before the data set, which takes seconds.
            while not (killed / "report.html").exists() and process.poll() is None:
                time.sleep(0.02)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "dataset").exists(), "it was killed too late to show anything"
    done = command("evaluate.py", *words, f"hydra.run.dir={killed}")
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((folder / "dataset" / "samples.json").read_text()) for folder in (whole, killed))
    assert len(one["samples"]) == 8
    assert without_identity(one) == without_identity(other)


def without_identity(node: object) -> object:
    """An export without what the database gives each sample anew: identifiers, a random number and times."""
    if isinstance(node, dict):
        anew = ("_id", "_dataset_id", "_rand", "created_at", "last_modified_at")
        return {key: without_identity(value) for key, value in node.items() if key not in anew}
    return [without_identity(value) for value in node] if isinstance(node, list) else node
