"""The end of a sweep of trainings, and the grids that ship."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from diffusion import training_sweep
from diffusion.schedules import Linear
from diffusion.training_sweep import choice, draw, read_sweep, report, trained

ROOT = Path(__file__).parents[2]


def job(folder, overrides, objective=None, losses=(), metric="val/loss", seconds=12.0):
    """A job's folder as Hydra and train.py leave it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    (folder / "logs").mkdir()
    rows = "".join(f"{10 * k},{loss},\n" for k, loss in enumerate(losses))
    (folder / "logs" / "metrics.csv").write_text(f"step,val/loss,train/loss_epoch\n{rows}")
    if objective is not None:
        record = {"metric": metric, "objective": objective, "seconds": seconds, "steps": 20, "epochs": 1}
        (folder / "result.json").write_text(json.dumps(record))


def rates(folder):
    """A sweep over the rate, in an order that is not the rate's; the third job failed."""
    for k, (rate, loss) in enumerate([("5e-4", 0.3), ("1e-4", 0.2), ("2e-3", None), ("2e-4", 0.25)]):
        job(folder / str(k), ["sweep=lr", f"optimizer.lr={rate}"], loss, [1.0, 0.5], seconds=10.0 + k)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_table_with_settings_objective_and_seconds(tmp_path, capsys):
    rates(tmp_path)
    report(tmp_path, [["sweep=lr", "optimizer.lr=1e-4"], ["sweep=lr", "optimizer.lr=9"]])
    table = rows(tmp_path / "sweep.csv")
    assert [row["optimizer.lr"] for row in table] == ["1e-4", "2e-4", "5e-4", "2e-3", "9"]
    assert [row["val/loss"] for row in table] == ["0.2", "0.25", "0.3", "", ""]
    assert [row["seconds"] for row in table] == ["11.0", "13.0", "10.0", "", ""]
    assert [row["folder"] for row in table[:4]] == ["1", "3", "0", "2"]
    assert "sweep" not in table[0]
    printed = capsys.readouterr().out
    assert "missing: optimizer.lr = 2e-3: failed or not finished" in printed
    assert "missing: optimizer.lr = 9: never begun" in printed
    assert "best val/loss: optimizer.lr = 1e-4 with 0.2; next optimizer.lr = 2e-4, 0.05 away" in printed
    assert min(Image.open(tmp_path / "sweep.png").size) > 300


def test_a_job_that_failed_has_not_the_objective_of_the_one_before(tmp_path, capsys):
    rates(tmp_path)
    (tmp_path / "1" / "failed.json").write_text(json.dumps({"error": "it is a job with other settings."}))
    report(tmp_path)
    assert [row["val/loss"] for row in rows(tmp_path / "sweep.csv")] == ["0.25", "0.3", "", ""]
    assert "missing: optimizer.lr = 1e-4: it is a job with other settings." in capsys.readouterr().out


def test_jobs_without_a_validation_have_no_objective(tmp_path, capsys):
    rates(tmp_path)
    for name in "013":
        record = json.loads((tmp_path / name / "result.json").read_text())
        (tmp_path / name / "result.json").write_text(json.dumps(record | {"objective": None}))
    report(tmp_path, [])
    table = rows(tmp_path / "sweep.csv")
    assert [(row["val/loss"], row["seconds"]) for row in table[:3]] == [("", "11.0"), ("", "13.0"), ("", "10.0")]
    assert "best" not in capsys.readouterr().out


def test_points_and_curves_stand_where_their_jobs_are(tmp_path, monkeypatch):
    rates(tmp_path)
    (tmp_path / "3" / "logs" / "metrics.csv").write_bytes(b"\xff\xfe")  # a damaged log leaves its curve out
    kept = []
    monkeypatch.setattr(training_sweep, "save", lambda figure, path: kept.append(figure))
    draw(read_sweep(tmp_path, (), trained), tmp_path / "sweep.png")
    left, right = kept[0].axes
    assert left.lines[0].get_xydata().tolist() == [[1e-4, 0.2], [2e-4, 0.25], [5e-4, 0.3]]
    assert left.get_xscale() == "log"
    assert [line.get_label() for line in right.lines] == ["optimizer.lr = 1e-4", "optimizer.lr = 5e-4"]
    assert right.lines[0].get_xydata().tolist() == [[1, 1.0], [11, 0.5]]


def test_settings_that_are_no_numbers_are_drawn_side_by_side(tmp_path, monkeypatch):
    for k, name in enumerate(("linear_rescaled", "cosine", "sigmoid")):
        job(tmp_path / str(k), [f"schedule={name}"], 0.1 * (3 - k))
    kept = []
    monkeypatch.setattr(training_sweep, "save", lambda figure, path: kept.append(figure))
    found = read_sweep(tmp_path, (), trained)
    draw(found, tmp_path / "sweep.png")
    labels = [text.get_text() for text in kept[0].axes[0].get_xticklabels()]
    assert labels == ["schedule = cosine", "schedule = linear_rescaled", "schedule = sigmoid"]
    assert choice(found).startswith("no best: val/loss does not compare where schedule differs")


@pytest.mark.parametrize(
    ("overrides", "metrics", "says"),
    [
        (("target=v", "target=eps"), ("val/loss", "val/loss"), "does not compare where target differs"),
        (("schedule=linear", "schedule=cosine"), ("val/loss", "val/loss"), "does not compare where schedule differs"),
        (("schedule.beta_end=1", "schedule.beta_end=2"), ("val/loss", "val/loss"), "does not compare"),
        (("weighting.gamma=1", "weighting.gamma=5"), ("val/loss", "val/loss"), "does not compare"),
        (("T=100", "T=500"), ("val/loss", "val/loss"), "does not compare where T differs"),
        (("data=mnist", "data=embedded"), ("val/loss", "val/loss"), "does not compare where data differs"),
        (("data.batch_size=8", "data.batch_size=16"), ("val/loss", "val/loss"), "best val/loss: data.batch_size = 8"),
        (("schedule=linear", "schedule=cosine"), ("val/clip_score",) * 2, "best val/clip_score: schedule = cosine"),
        (("seed=1", "seed=2"), ("val/loss", "val/clip_score"), "different objectives"),
        (("seed=1", "seed=2"), ("val/clip_score", "val/clip_score"), "best val/clip_score: seed = 2 with 0.7"),
        (("seed=1", "seed=2"), ("val/odd", "val/odd"), ""),
    ],
)
def test_what_does_not_compare_has_no_best(tmp_path, overrides, metrics, says):
    for k, value in enumerate((0.5, 0.7)):
        job(tmp_path / str(k), [overrides[k]], value, metric=metrics[k])
    said = choice(read_sweep(tmp_path, (), trained))
    assert says in said
    assert bool(says) == bool(said)


def test_a_loss_that_is_no_number_never_wins(tmp_path):
    job(tmp_path / "0", ["seed=1"], float("nan"))
    job(tmp_path / "1", ["seed=2"], 0.5)
    assert choice(read_sweep(tmp_path, (), trained)).startswith("best val/loss: seed = 2 with 0.5.")


def test_damaged_records_are_named_and_an_empty_sweep_says_nothing(tmp_path, capsys):
    job(tmp_path / "a" / "0", ["seed=1"], 0.5)
    job(tmp_path / "a" / "1", ["seed=2"], 0.5)
    (tmp_path / "a" / "1" / "result.json").write_text("{")
    report(tmp_path / "a")
    assert "missing: seed = 2: result.json is damaged" in capsys.readouterr().out
    job(tmp_path / "b" / "0", ["seed=1"])
    report(tmp_path / "b")
    assert capsys.readouterr().out == ""


GRIDS = {
    "T": {"T": ["100", "500", "1000"], "schedule": ["linear_rescaled"]},
    "schedule": {"schedule": ["linear_rescaled", "cosine", "sigmoid"]},
    "guidance": {"guidance.weight": ["0", "6.5", "14"]},
    "lr": {"optimizer.lr": ["0.0001", "0.0002", "0.0005"]},
    "batch": {"data.batch_size": ["8", "16", "32"]},
}


@pytest.mark.parametrize("name", [*GRIDS, "optuna"])
def test_the_grids_are_those_that_were_asked_for(name):
    command = "evaluate" if name == "guidance" else "train"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(command, [f"sweep={name}"], return_hydra_config=True)
        hydra = config.hydra
        assert hydra.mode.name == "MULTIRUN"
        assert "sweep_report" in hydra.callbacks
        words = [f"{key}={value}" for key, value in hydra.sweeper.params.items()]
        parsed = OverridesParser.create().parse_overrides(words)
        if name == "optuna":
            assert "Optuna" in hydra.sweeper._target_
            assert {override.get_key_element() for override in parsed} == {
                "optimizer.lr", "data.batch_size", "module.times"
            }  # fmt: skip
            return
        found = {}
        for override in parsed:
            values = override.sweep_string_iterator() if override.is_sweep_override() else [override.value()]
            found[override.key_or_group] = [str(value) for value in values]
        assert found == GRIDS[name]
        # Every job of the grid is a config.
        for key, values in found.items():
            for value in values:
                more = ["ckpt=x"] if command == "evaluate" else []
                compose(command, [f"{key}={value}", *more])


def test_few_steps_end_in_the_noise_of_many():
    """Against diffusers, whose table takes any two betas, and the limit: log alpha_bar is a sum of logs of betas."""
    from diffusers import DDPMScheduler

    whole = Linear(1000)
    for T in (100, 500):
        short, plain = Linear(T, rescale_from=1000), Linear(T)
        scale = 1000 / T
        theirs = DDPMScheduler(T, beta_start=scale * 1e-4, beta_end=scale * 0.02, beta_schedule="linear")
        torch.testing.assert_close(short.betas.float(), theirs.betas)
        torch.testing.assert_close(short.alpha_bar[1:].float(), theirs.alphas_cumprod, rtol=1e-5, atol=1e-8)
        ends = [schedule.alpha_bar[-1].log().item() for schedule in (whole, short, plain)]
        # sum log(1 - b) = -sum b - sum b^2 / 2 - ...: the first terms agree, the second grows with the scale.
        assert ends[1] == pytest.approx(ends[0], rel=0.08)
        assert ends[2] == pytest.approx(ends[0] / scale, rel=0.03)
    torch.testing.assert_close(Linear(1000, rescale_from=1000).betas, whole.betas, rtol=0, atol=0)


TINY = ["experiment=demo", "data.n_train=32", "data.n_val=8", "network.down_chs=[32,32,32]", "trainer=cpu"]
TINY += ["callbacks=fit", "trainer.max_steps=2", "trainer.check_val_every_n_epoch=1"]


def sweep(folder, *words):
    return subprocess.run(
        [sys.executable, "train.py", *TINY, *words, f"hydra.sweep.dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=500,
    )


@pytest.mark.slow
def test_a_real_sweep_ends_with_its_table_and_picture(tmp_path):
    done = sweep(tmp_path, "sweep=batch")
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path / "sweep.csv")
    assert [row["data.batch_size"] for row in table] == ["8", "16", "32"]
    for row in table:
        record = json.loads((tmp_path / row["folder"] / "result.json").read_text())
        assert float(row["val/loss"]) == record["objective"]
        assert 0 < float(row["seconds"]) == record["seconds"]
    assert done.stdout.count("best val/loss: data.batch_size = ") == 1
    assert (tmp_path / "sweep.png").exists()


@pytest.mark.slow
def test_a_search_is_reported_too(tmp_path):
    pytest.importorskip("optuna")
    done = sweep(tmp_path, "sweep=optuna", "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path / "sweep.csv")
    assert len(table) == 2
    assert len({row["optimizer.lr"] for row in table}) == 2
    assert (tmp_path / "optimization_results.yaml").exists()
    assert done.stdout.count("best val/loss: ") == 1
