"""From a classifier that may decline to a data set of drawn digits, as a person types it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from diffusion.evaluation.classifier import load_classifier
from tests.e2e.conftest import Run
from tests.fake_digits import pretend

Call = Callable[..., Path]
QUICK = ["trainer.accelerator=cpu", "trainer.limit_val_batches=2"]


@pytest.fixture(autouse=True)
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


@pytest.mark.slow
def test_a_classifier_declines_what_it_should(call: Call, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = call(
        "train.py",
        "experiment=mnist_idk",
        *QUICK,
        "data.judges={folds: 2, epochs: 1, batch_size: 256}",
        "data.batch_size=256",
        "scheduler.warmup_steps=5",
        "trainer.max_steps=120",
        "callbacks.selective.rule=coverage",
        "callbacks.selective.target=0.7",
        folder=tmp_path / "classifier",
    )
    found = json.loads((folder / "selective.json").read_text())
    assert (found["n_calibration"], found["n_test"]) == (3000, 10_000)
    assert found["selective"]["accuracy"] > found["accuracy"] > 0.5
    assert found["selective"]["coverage"] == pytest.approx(0.7, abs=0.04)
    low, high = found["selective"]["coverage_interval"]
    assert low < found["selective"]["coverage"] < high
    assert 1 - found["selective"]["coverage"] == pytest.approx(found["hard_share"] + found["soft_share"])
    for name in ("selective", "reliability", "decisions"):
        assert (folder / "plots" / f"{name}.png").stat().st_size > 5000
    classifier = load_classifier(folder / "classifier.safetensors")
    assert classifier.network.classes == 11
    assert (classifier.temperature, classifier.threshold) == (found["temperature"], found["threshold"])
    said = capfd.readouterr().out
    assert "IDK: 10," in said or "IDK: 11," in said
    assert "judge 2 of 2" in said
    assert str(folder / "classifier.safetensors") in said
    with (folder / "logs" / "metrics.csv").open() as file:
        assert [row for row in csv.DictReader(file) if row.get("test/accuracy")]

    model = call(
        "train.py",
        "experiment=mnist",
        *QUICK,
        "network.down_chs=[32,32,32]",
        "data.batch_size=8",
        "sampler=ddim",
        "sampler.steps=2",
        "callbacks=fit",
        "trainer.max_steps=2",
        folder=tmp_path / "model",
    )
    evaluated = call(
        "evaluate.py",
        f"ckpt={model / 'checkpoints' / 'last.ckpt'}",
        "protocol=mnist",
        f"classifier.weights={folder / 'classifier.safetensors'}",
        "num_images=30",
        "dataset=null",
        folder=tmp_path / "evaluated",
    )
    frame = pd.read_parquet(evaluated / "records.parquet")
    assert set(frame["rejection_type"]) <= {"none", "soft", "hard"}
    assert ((frame["final_label"] == "IDK") == frame["is_idk"]).all()
    document = json.loads((evaluated / "metrics.json").read_text())
    names = {key.rsplit("_", 1)[0] for key in document["metrics"]}
    assert {"classifier_confidence", "classifier_declined", "classifier_fd", "classifier_kd", "digit_7"} <= names
    assert not names & {"fid", "kid", "is"}
    assert document["metrics"]["classifier_declined_30"]["value"] == frame["is_idk"].mean()
    assert (evaluated / "plots" / "classes.png").exists()
    assert (evaluated / "plots" / "confused.png").exists()
    assert "What the classifier" not in said
    page = (evaluated / "report.html").read_text()
    assert "plots/classes.png" in page


def test_ten_digits_and_their_condition(call: Call, tmp_path: Path) -> None:
    """A model that is asked for digits is judged by whether the classifier sees them."""
    model = call(
        "train.py",
        "experiment=mnist_class",
        *QUICK,
        "network.down_chs=[32,32,32]",
        "data.batch_size=8",
        "callbacks=fit",
        "trainer.max_steps=2",
        folder=tmp_path / "model",
    )
    evaluated = call(
        "evaluate.py",
        f"ckpt={model / 'checkpoints' / 'last.ckpt'}",
        *("protocol=mnist", "classifier.threshold=0", "sampler=ddim", "sampler.steps=2"),
        *("num_images=20", "dataset=null", "embedding=null", "nearest=null"),
        folder=tmp_path / "evaluated",
    )
    frame = pd.read_parquet(evaluated / "records.parquet")
    assert list(frame["label"]) == [str(k % 10) for k in range(20)]
    metrics = json.loads((evaluated / "metrics.json").read_text())["metrics"]
    accepted = frame[~frame["is_idk"]]
    share = (accepted["final_label"] == accepted["label"]).mean() if len(accepted) else None
    assert metrics["classifier_accuracy_20"]["value"] == share


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["experiment=mnist_idk", "network.classes=10"], "choose data and network that fit"),
        (["experiment=mnist_classifier", "data.split={train: 0.9, val: 0.1}"], "calibration"),
        (["experiment=mnist_classifier", "module.loss=hinge"], "module.loss"),
        (["experiment=mnist_idk", "data.quantile=2"], "data.quantile"),
    ],
)
def test_bad_input(
    overrides: list[str], says: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from datamodules import mnist_idk

    monkeypatch.setattr(mnist_idk, "held_out_logits", lambda images, *_: __import__("numpy").eye(10)[[0] * len(images)])
    assert says in refused("train.py", *overrides, *QUICK)


def test_an_experiment_is_evaluated_by_the_protocol_of_its_name(command: Run) -> None:
    done = command("evaluate.py", "ckpt=any.ckpt", "experiment=mnist", "num_images=7", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["classifier"]["weights"] == "mnist_idk"
    assert config["inception"] is None
    assert config["num_images"] == 7
