import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffusion.evaluation import sweep
from diffusion.evaluation.metric import Result
from diffusion.evaluation.report import write_metrics
from diffusion.evaluation.sweep import best, choices, draw_sweep, read_sweep, report
from tests.diffusion.evaluation.fake_run import CLIP, RUN

ROOT = Path(__file__).resolve().parents[3]


def job(folder, overrides, clip=None, kid=None, fid=None, n=64, kid_std=0.001):
    """A job's folder as Hydra and evaluate.py leave it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {text}\n" for text in overrides))
    found = {}
    if clip is not None:
        found[f"clip_score_100_{n}/{CLIP}"] = Result(clip, "higher")
    if kid is not None:
        found[f"kid_{n}"], found[f"kid_std_{n}"] = Result(kid, "lower"), Result(kid_std)
    if fid is not None:
        found[f"fid_{n}"] = Result(fid, "lower")
    write_metrics(folder, RUN, found)


def weights(folder):
    """A sweep over w whose best by KID is 10 and by CLIP is 2, in an order that is not w's."""
    for k, (w, clip, kid) in enumerate(
        [("10", 25.0, 0.01), ("-1", 20.0, 0.05), ("2", 28.0, 0.02), ("0.5", 22.0, 0.03)]
    ):
        job(folder / str(k), ["ckpt=a.ckpt", f"guidance.weight={w}"], clip, kid, 1000 * kid)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_settings_are_sorted_as_numbers_and_stay_with_their_metrics(tmp_path, capsys):
    weights(tmp_path)
    report(tmp_path)
    table = rows(tmp_path / "sweep.csv")
    assert [row["guidance.weight"] for row in table] == ["-1", "0.5", "2", "10"]
    assert [float(row["kid_64"]) for row in table] == [0.05, 0.03, 0.02, 0.01]
    assert [float(row[f"clip_score_100_64/{CLIP}"]) for row in table] == [20.0, 22.0, 28.0, 25.0]
    assert [row["folder"] for row in table] == ["1", "3", "2", "0"]
    assert "ckpt" not in table[0]
    printed = capsys.readouterr().out
    lines = [line.split()[0] for line in printed.splitlines() if line.split()[:1] and line.split()[0][-1].isdigit()]
    assert lines == ["-1", "0.5", "2", "10"]
    assert "best KID: w = 10 with 0.01; next w = 2, 0.01 away\n" in printed
    assert f"best CLIP score × 100 by {CLIP}: w = 2 with 28; next w = 10, 3 away" in printed
    assert "N = 64 images" in printed
    assert min(Image.open(tmp_path / "sweep.png").size) > 300


def test_points_stand_where_their_metrics_are(tmp_path, monkeypatch):
    weights(tmp_path)
    kept = []
    monkeypatch.setattr(sweep, "save", lambda figure, path: kept.append(figure))
    assert draw_sweep(read_sweep(tmp_path), tmp_path / "sweep.png")
    for axes, scale in zip(kept[0].axes, (1, 1000), strict=True):
        places = {text.get_text(): text.xy for text in axes.texts}
        assert set(places) == {"w = -1", "w = 0.5", "w = 2", "w = 10"}
        for w, (clip, kid) in {"10": (25, 0.01), "-1": (20, 0.05), "2": (28, 0.02), "0.5": (22, 0.03)}.items():
            assert places[f"w = {w}"] == pytest.approx((kid * scale, clip))
        line = max(axes.lines, key=lambda line: len(line.get_xdata()) * (line.get_linestyle() == "-"))
        assert list(line.get_ydata()) == [20.0, 22.0, 28.0, 25.0]
    assert kept[0].axes[0].get_xlabel().startswith("KID")
    assert kept[0].axes[1].get_xlabel().startswith("FID")


def test_seeds_that_share_images_are_told_from_those_that_do_not(tmp_path):
    for name, step in (("near", 63), ("far", 64)):
        for k in range(2):
            job(tmp_path / name / str(k), [f"seed={k * step}"], kid=0.01)
    near, far = ("\n".join(choices(read_sweep(tmp_path / name))) for name in ("near", "far"))
    assert "less than 64 apart drew images from the same noise" in near
    assert "same noise" not in far
    assert "with a seed that is 64 away or more" in far


def test_differences_within_the_deviation_are_called_so(tmp_path):
    job(tmp_path / "0", ["guidance.weight=1"], kid=0.010, kid_std=0.004)
    job(tmp_path / "1", ["guidance.weight=2"], kid=0.012, kid_std=0.001)
    assert "less than the deviation 0.004" in choices(read_sweep(tmp_path))[0]


def test_without_kid_it_is_fid_and_without_both_clip(tmp_path):
    job(tmp_path / "a" / "0", ["guidance.weight=1"], clip=20.0, fid=30.0)
    job(tmp_path / "a" / "1", ["guidance.weight=2"], clip=21.0, fid=40.0)
    job(tmp_path / "b" / "0", ["guidance.weight=1"], clip=20.0)
    job(tmp_path / "b" / "1", ["guidance.weight=2"], clip=21.0)
    first, second = choices(read_sweep(tmp_path / "a")), choices(read_sweep(tmp_path / "b"))
    assert first[0].startswith("best FID: w = 1 with 30")
    assert first[1].startswith("best CLIP score")
    assert second[0].startswith("best CLIP score")
    assert "w = 2 with 21" in second[0]
    assert draw_sweep(read_sweep(tmp_path / "b"), tmp_path / "b.png")


def test_other_numbers_of_images_do_not_compare(tmp_path):
    job(tmp_path / "0", ["num_images=64"], kid=0.01, n=64)
    job(tmp_path / "1", ["num_images=128"], kid=0.02, n=128)
    found = read_sweep(tmp_path)
    assert [found.label(job) for job in found.jobs] == ["num_images = 64", "num_images = 128"]
    with pytest.raises(sweep.AntherError, match="does not compare"):
        best(found, "kid")
    report(tmp_path)
    assert [row["kid_128"] for row in rows(tmp_path / "sweep.csv")] == ["", "0.02"]


def test_a_metric_that_a_job_could_not_have_does_not_win(tmp_path):
    job(tmp_path / "0", ["guidance.weight=1"], clip=20.0)
    job(tmp_path / "1", ["guidance.weight=2"], clip=21.0, kid=0.02)
    write_metrics(tmp_path / "0", RUN, {"kid_64": Result(None, "lower", note="no weights")})
    assert "w = 2" in choices(read_sweep(tmp_path))[0]


def test_other_keys_become_the_first_columns(tmp_path, monkeypatch):
    for k, (steps, w) in enumerate([(50, 1), (5, 1), (50, 0), (5, 0)]):
        job(tmp_path / str(k), [f"+sampler.steps={steps}", "seed=1", f"guidance.weight={w}"], 20.0 + k, 0.1 * (k + 1))
    kept = []
    monkeypatch.setattr(sweep, "save", lambda figure, path: kept.append(figure))
    report(tmp_path)
    table = rows(tmp_path / "sweep.csv")
    assert list(table[0])[:2] == ["sampler.steps", "guidance.weight"]
    assert [(row["sampler.steps"], row["guidance.weight"]) for row in table] == [
        ("5", "0"), ("5", "1"), ("50", "0"), ("50", "1")
    ]  # fmt: skip
    legend = [text.get_text() for text in kept[0].axes[-1].get_legend().get_texts()]
    assert legend == ["sampler.steps = 5", "sampler.steps = 50"]


def test_failed_and_damaged_jobs_are_listed(tmp_path, capsys):
    weights(tmp_path)
    (tmp_path / "1" / "metrics.json").unlink()
    (tmp_path / "3" / "metrics.json").write_text("{")
    report(tmp_path, [["ckpt=a.ckpt", "guidance.weight=2"], ["ckpt=a.ckpt", "guidance.weight=20"]])
    printed = capsys.readouterr().out
    assert "missing: w = -1: not finished" in printed
    assert "missing: w = 0.5: metrics.json is damaged" in printed
    assert "missing: w = 20: never begun" in printed
    table = rows(tmp_path / "sweep.csv")
    assert [(row["guidance.weight"], bool(row["missing"])) for row in table] == [
        ("2", False), ("10", False), ("-1", True), ("0.5", True), ("20", True)
    ]  # fmt: skip


def test_a_job_that_was_refused_has_not_the_numbers_of_the_one_before(tmp_path, capsys):
    weights(tmp_path)
    (tmp_path / "1" / "failed.json").write_text(json.dumps({"error": "it holds images of other settings."}))
    # Hydra has written what was asked for, and then the process was killed.
    (tmp_path / "3" / ".hydra" / "finished.yaml").write_text("- guidance.weight=7\n")
    report(tmp_path)
    table = {row["guidance.weight"]: row for row in rows(tmp_path / "sweep.csv")}
    assert [weight for weight, row in table.items() if row["kid_64"]] == ["2", "10"]
    assert table["-1"]["missing"] == "it holds images of other settings."
    assert "of other settings" in table["0.5"]["missing"]
    assert "missing: w = 0.5: not finished" in capsys.readouterr().out


def test_a_sweep_without_evaluations_says_nothing(tmp_path, capsys):
    (tmp_path / "0" / ".hydra").mkdir(parents=True)
    (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text("- seed=1\n")
    report(tmp_path)
    assert capsys.readouterr().out == ""
    assert {path.name for path in tmp_path.iterdir()} == {"0"}


SCRIPT = """
import sys
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from diffusion import cli

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    w = cfg.guidance.weight
    print("torch" in sys.modules)
    if w == cfg.fails:
        raise cli.AntherError("this one fails.")
    from diffusion.evaluation.metric import Result
    from diffusion.evaluation.report import write_metrics
    write_metrics(Path(HydraConfig.get().runtime.output_dir), {}, {"kid_64": Result(abs(w - 2) / 100, "lower")})

cli.run(main)
"""
CONFIG = """
fails: null
guidance: {weight: 1}
hydra:
  sweep: {dir: "sweep_${now:%H-%M-%S}", subdir: "${hydra.job.num}"}
  callbacks:
    sweep_report: {_target_: diffusion.evaluation.sweep.SweepReport}
"""


def hydra_run(folder, *arguments):
    (folder / "conf").mkdir(parents=True)
    (folder / "conf" / "app.yaml").write_text(CONFIG)
    (folder / "app.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_hydra_ends_a_sweep_with_the_report(tmp_path):
    done = hydra_run(tmp_path, "-m", "guidance.weight=10,0,2")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.count("best KID: w = 2 with 0") == 1
    assert "missing" not in done.stdout
    assert "True" not in done.stdout
    (folder,) = tmp_path.glob("sweep_*")
    assert [row["guidance.weight"] for row in rows(folder / "sweep.csv")] == ["0", "2", "10"]
    assert (folder / "sweep.png").exists()


def test_a_sweep_with_a_failed_job_is_reported_too(tmp_path):
    done = hydra_run(tmp_path, "-m", "guidance.weight=0,2,10", "fails=2")
    assert done.returncode == 1
    assert "this one fails" in done.stderr
    assert done.stdout.count("best KID: w = 0 with 0.02") == 1
    assert "missing: w = 2: not finished" in done.stdout
    assert "never begun" not in done.stdout


def test_a_single_run_says_nothing(tmp_path):
    done = hydra_run(tmp_path, "guidance.weight=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n"
