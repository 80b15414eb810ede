import csv
import os
import shutil
import sys

import pytest
import yaml

from diffusion import cli
from diffusion.errors import AntherError
from diffusion.evaluation.metric import Result
from diffusion.evaluation.report import write_metrics
from diffusion.evaluation.results import COLUMNS, collect, main, run_folders
from diffusion.files import sha256
from diffusion.loggers import CSVLog
from tests.diffusion.evaluation.fake_run import CLIP, RUN

TRAINING = {"objective": "val/loss", "trainer": {"max_steps": 30}, "callbacks": {}}
LOSSES = (0.5, 0.0327, 0.0888)


def training(folder, name="flowers", finished=True, parameters=34122243, losses=LOSSES):
    """The files that train.py leaves, by what writes them there."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"name": name, "T": 400}))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").write_bytes(str(folder).encode())
    log = CSVLog(folder / "logs" / "metrics.csv")
    if not finished:
        log.log_metrics({"parameters": parameters}, 0)
    for k, (loss, seconds, memory) in enumerate(zip(losses, (30.0, 18.0, 19.0), (100, 250, 200), strict=True)):
        log.log_metrics({"val/loss": loss, "epoch_seconds": seconds, "peak_gpu_mem_mb": memory}, 10 * k + 9)
        log.log_metrics({"train/loss_step": 1.0}, 10 * k + 5)
    log.finalize("success")
    if finished:
        cli.write_result(folder, TRAINING, losses[-1], 30, 3, parameters, 60.0)
    return folder / "checkpoints" / "last.ckpt"


def evaluation(folder, checkpoint, digest=None, clip=27.3, n=500, experiment="flowers", **metrics):
    """The metrics.json of evaluate.py."""
    folder.mkdir(parents=True)
    run = {**RUN, "experiment": experiment, "checkpoint": str(checkpoint), "num_images": n}
    run["checkpoint_sha256"] = digest or "none"
    found = {
        f"clip_score_{n}/{CLIP}": Result(clip / 100),
        f"clip_score_100_{n}/{CLIP}": Result(clip),
        f"fid_{n}": Result(87.5),
        f"kid_{n}": Result(0.0123),
        f"kid_std_{n}": Result(0.5),
    }
    write_metrics(folder, run, found | {f"{name}_{n}": Result(value) for name, value in metrics.items()})


def test_a_row_holds_what_training_and_evaluation_recorded(tmp_path):
    checkpoint = training(tmp_path / "flowers" / "first")
    evaluation(tmp_path / "evaluation" / "w3", checkpoint, classifier_confidence=0.8179)
    results = collect(tmp_path)
    assert not results.damaged
    (row,) = results.rows
    assert row == {
        "experiment": "flowers",
        "run": "evaluation/w3",
        "val_loss_best": 0.0327,
        "val_loss_last": 0.0888,
        "val_loss_evaluated": 0.0888,
        "guidance_weight": 3.0,
        "num_images": 500,
        "clip_score_100": 27.3,
        "clip_model": CLIP,
        "fid": 87.5,
        "kid": 0.0123,
        "classifier_confidence_percent": pytest.approx(81.79),
        "parameters": 34122243,
        "epoch_seconds": 19.0,
        "peak_gpu_mem_mb": 250.0,
        "note": "",
    }


def test_evaluations_find_their_training_by_path_and_by_hash(tmp_path):
    one = training(tmp_path / "one", "one", parameters=1)
    two = training(tmp_path / "two", "two", parameters=2, finished=False)
    training(tmp_path / "three", "three", parameters=3)
    evaluation(tmp_path / "e" / "2", one)
    evaluation(tmp_path / "e" / "10", "/gone/last.ckpt", sha256(two))
    evaluation(tmp_path / "two" / "evaluation", two)
    evaluation(tmp_path / "e" / "foreign", "/gone/other.ckpt", "ab")
    rows = {row["run"]: row for row in collect(tmp_path).rows}
    assert set(rows) == {"e/2", "e/10", "two/evaluation", "e/foreign", "three"}
    assert rows["e/2"]["val_loss_best"] == 0.0327
    assert "unfinished" in rows["e/10"]["note"]
    assert "unfinished" in rows["two/evaluation"]["note"]
    assert rows["e/foreign"]["note"] == "no training record"
    assert "val_loss_best" not in rows["e/foreign"]
    assert rows["e/foreign"]["parameters"] == RUN["parameters"]
    assert "clip_score_100" not in rows["three"]
    assert rows["three"]["parameters"] == 3


def test_a_checkpoint_that_changed_since_is_named(tmp_path):
    checkpoint = training(tmp_path / "one")
    evaluation(tmp_path / "e", checkpoint)
    os.utime(checkpoint, (2e9, 2e9))
    (row,) = collect(tmp_path).rows
    assert row["note"] == "its checkpoint was written anew since"


def test_folders_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("sweep/10", "sweep/2", "b", "a/images/x"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
    assert [str(path.relative_to(tmp_path)) for path in run_folders(tmp_path)] == ["b", "sweep/2", "sweep/10"]


@pytest.mark.parametrize(
    ("file", "text", "left"),
    [
        ("one/.hydra/config.yaml", "name: [", {"two"}),
        ("one/.hydra/config.yaml", "3", {"two"}),
        ("one/logs/metrics.csv", "step,val/loss\n3,many\n", {"one", "two"}),
        ("one/logs/metrics.csv", "", {"one", "two"}),
        ("one/result.json", '{"metric"', {"one", "two"}),
        ("two/metrics.json", "{}", {"one"}),
    ],
)
def test_damaged_records_are_named_and_left_out(tmp_path, capsys, file, text, left):
    training(tmp_path / "one")
    evaluation(tmp_path / "two", "/gone/last.ckpt", "ab")
    (tmp_path / file).write_text(text)
    results = collect(tmp_path)
    assert {row["run"] for row in results.rows} == left
    assert len(results.damaged) == 1
    main([str(tmp_path)])
    assert f"left out: {tmp_path / file} is damaged" in capsys.readouterr().out


def test_a_loss_that_is_no_number_is_last_but_never_best(tmp_path):
    training(tmp_path / "one", losses=(0.5, 0.4, float("nan")))
    (row,) = collect(tmp_path).rows
    assert row["val_loss_best"] == 0.4
    assert row["val_loss_last"] != row["val_loss_last"]


def test_a_run_without_a_log_has_its_objective(tmp_path):
    training(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "logs")
    (row,) = collect(tmp_path).rows
    assert row == {"experiment": "flowers", "val_loss_last": 0.0888, "parameters": 34122243, "run": "one"}


def test_a_run_without_a_validation_has_no_objective(tmp_path):
    checkpoint = training(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "logs")
    cli.write_result(checkpoint.parents[1], TRAINING, None, 30, 3, 34122243, 60.0)
    (row,) = collect(tmp_path).rows
    assert row == {"experiment": "flowers", "parameters": 34122243, "run": "one"}


def test_runs_of_other_commands_are_no_rows(tmp_path):
    (tmp_path / "samples" / ".hydra").mkdir(parents=True)
    (tmp_path / "samples" / ".hydra" / "config.yaml").write_text("name: samples\n")
    with pytest.raises(AntherError, match=r"there is no run below .*: train one"):
        main([str(tmp_path)])


def test_the_command_prints_and_writes_the_same_table(tmp_path, capsys):
    checkpoint = training(tmp_path / "runs" / "one", "roses | [red]")
    evaluation(tmp_path / "runs" / "e", checkpoint, experiment="roses | [red]")
    main([str(tmp_path / "runs"), "--csv", str(tmp_path / "all.csv")])
    printed = capsys.readouterr().out
    for text in ("roses | [red]", "34,122,243", "0.0327", "0.0888", "27.3", CLIP, "87.5", "0.0123", "19", "250"):
        assert text in printed
    with (tmp_path / "all.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == list(COLUMNS)
    assert row["experiment"] == "roses | [red]"
    assert float(row["val_loss_best"]) == 0.0327
    assert row["classifier_confidence_percent"] == ""
    main([str(tmp_path / "runs"), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.replace("\\|", "").count("|") == len(COLUMNS) + 1 for line in lines)


def test_an_empty_folder_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["results", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: there is no run below")
