import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.evaluation.metric import Result
from diffusion.evaluation.report import write_metrics
from diffusion.evaluation.track import track
from diffusion.loggers import CSVLog, finish, wandb_logger
from tests.callbacks.test_loggers import items, whole
from tests.diffusion.evaluation.fake_run import PROMPTS, RUN, flat, make_run, results
from tests.test_hostile_words import PROMPTS as HOSTILE


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


class Held:
    """What an offline run holds on disk."""

    def __init__(self, folder, **options):
        csv, board = CSVLog(folder / "m.csv"), wandb_logger("anther-test", folder / "logs")
        track(folder, [csv, board], **options)
        finish([csv, board])
        (file,) = (folder / "logs" / "wandb").glob("offline-run-*/*.wandb")
        self.files = file.parent / "files"
        self.config, self.summary, self.history, self.artifact = {}, {}, {}, {}
        for record in whole(file):
            match record.WhichOneof("record_type"):
                case "run":
                    self.config |= items(record.run.config.update)
                case "config":
                    self.config |= items(record.config.update)
                case "summary":
                    self.summary |= items(record.summary.update)
                case "history":
                    self.history |= items(record.history.item)
                case "artifact":
                    contents = record.artifact.manifest.contents
                    self.artifact |= {entry.path: Path(entry.local_path) for entry in contents}

    def table(self, key):
        return json.loads((self.files / self.history[f"{key}/path"]).read_text())


@pytest.mark.usefixtures("offline")
def test_what_wandb_holds_is_the_record(tmp_path):
    # The most representative image, of the first prompt, is not the one that Brain gives 1, of the second.
    closeness = np.roll(np.linspace(1, 0, 12), 3)
    frame = make_run(tmp_path, 12, representativeness_closeness=closeness, representativeness=np.roll(closeness, 1))
    found = results(frame, 12)
    write_metrics(tmp_path, RUN, found)
    (tmp_path / "plots").mkdir()
    Image.fromarray(flat(3)).save(tmp_path / "plots" / "grid.png")
    held = Held(tmp_path)

    for key, value in RUN.items():
        assert held.config[key] == value
    for key, result in found.items():
        assert held.history.get(key) == result.value
    ((picture,),) = [held.history["plots/grid/filenames"]]
    assert (held.files / picture).read_bytes() == (tmp_path / "plots" / "grid.png").read_bytes()

    table = held.table("evaluation_results_table")
    assert table["columns"] == ["Image", "Prompt", "CLIP Score", "Uniqueness", "Representativeness"]
    columns = ["prompt", "clip_score", "uniqueness", "representativeness"]
    assert [row[1:] for row in table["data"]] == frame[columns].to_numpy().tolist()
    # The table's pictures travel in its artifact.
    (full,) = (path for name, path in held.artifact.items() if name.endswith("evaluation_results_table.table.json"))
    for k, row in enumerate(json.loads(full.read_text())["data"]):
        assert np.array_equal(np.asarray(Image.open(held.artifact[row[0]["path"]])), flat(k))
        assert row[1] == frame["prompt"][k]

    for chart, column in {
        "clip_scores_chart": "clip_score",
        "uniqueness_chart": "uniqueness",
        "representativeness_chart": "representativeness",
    }.items():
        bars = dict(held.table(f"{chart}_table")["data"])
        assert list(bars) == RUN["prompts"]
        for k, mean in enumerate(bars.values()):
            assert mean == pytest.approx(np.mean(frame[column][k::3]))

    assert frame["prompt"][frame["representativeness"].idxmax()] == PROMPTS[1]
    best, unique, near = (frame[c].idxmax() for c in ("clip_score", "uniqueness", "representativeness_closeness"))
    expected = {
        "total_images_generated": 12,
        "best_clip_score": frame["clip_score"][best],
        "best_clip_prompt": frame["prompt"][best],
        "most_unique_prompt": frame["prompt"][unique],
        "most_representative_prompt": frame["prompt"][near],
        "fid_score": 87.50031,
        "mean_clip_score": np.mean(frame["clip_score"].to_numpy()),
        "std_clip_score": np.std(frame["clip_score"].to_numpy()),
        "min_clip_score": min(frame["clip_score"]),
        "max_clip_score": max(frame["clip_score"]),
        "mean_uniqueness": np.mean(frame["uniqueness"].to_numpy()),
        "mean_representativeness": np.mean(frame["representativeness"].to_numpy()),
    }
    assert {key: held.summary[key] for key in expected} == pytest.approx(expected)


@pytest.mark.usefixtures("offline")
def test_hostile_words_are_words(tmp_path):
    n = len(HOSTILE)
    write_metrics(tmp_path, {**RUN, "prompts": list(HOSTILE)}, results(make_run(tmp_path, n, HOSTILE), n))
    held = Held(tmp_path)
    assert held.config["prompts"] == list(HOSTILE)
    assert [row[1] for row in held.table("evaluation_results_table")["data"]] == list(HOSTILE)
    assert set(dict(held.table("clip_scores_chart_table")["data"])) == set(HOSTILE)
    assert held.summary["best_clip_prompt"] in HOSTILE


@pytest.mark.usefixtures("offline")
def test_what_was_not_computed_is_not_there(tmp_path):
    absent = dict.fromkeys(("uniqueness", "representativeness", "representativeness_closeness"))
    make_run(tmp_path, 6, prompts=None, clip_score=[0.1, np.nan, 0.3, 0.2, 0.5, 0.4], **absent)
    write_metrics(tmp_path, RUN, {"fid_6": Result(None, "lower", note="no weights")})
    held = Held(tmp_path, max_rows=4)
    rows = held.table("evaluation_results_table")["data"]
    assert [row[1:] for row in rows] == [
        [None, 0.1, None, None], [None, None, None, None], [None, 0.3, None, None], [None, 0.2, None, None]
    ]  # fmt: skip
    assert "clip_scores_chart_table/path" in held.history
    assert not [key for key in held.history if "uniqueness" in key or "fid" in key]
    assert held.summary["mean_clip_score"] == pytest.approx(0.3)
    for key in ("fid_score", "best_clip_prompt", "most_unique_prompt", "mean_uniqueness", "most_representative_prompt"):
        assert key not in held.summary


def test_a_csv_log_gets_nothing_and_needs_no_folder(tmp_path):
    track(tmp_path / "absent", [CSVLog(tmp_path / "m.csv")])
    assert not list(tmp_path.iterdir())
