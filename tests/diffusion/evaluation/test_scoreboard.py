import csv

import pytest
from PIL import Image

from diffusion.errors import AntherError
from diffusion.evaluation.metric import Result
from diffusion.evaluation.report import write_metrics
from diffusion.evaluation.scoreboard import cells, collect, draw, main, markdown
from tests.diffusion.evaluation.fake_run import RUN

PROTOCOL = {"N_real": 6149, "split": "train", "image_shape": [3, 64, 64], "weights_sha256": "67" * 32}


def evaluation(folder, model, fid, n=500, digest="aa" * 32, data="flowers102", sampler=True, **changes):
    """The metrics.json of evaluate.py."""
    protocol = {**PROTOCOL, "N": n, "data_digest": digest, **changes}
    protocol.setdefault("reals", f"{digest} {protocol['N_real']}")
    results = {
        f"fid_{n}": Result(fid, "lower", "poor (not below 50)", None, protocol),
        f"kid_{n}": Result(fid / 1000, "lower", "good (below 0.05)", None, protocol),
        f"kid_std_{n}": Result(0.0041, None, None, None, protocol),
        f"is_{n}": Result(None, "higher", None, "no fc layer", protocol),
        f"diversity_{n}": Result(20.5, None, None, None, {"N": n}),
        f"diversity_pairs_{n}": Result(99.0, None, None, None, {"N": n}),
    }
    facts = {**RUN, "experiment": model, "data": data, "num_images": n, "guidance_weight": None}
    if not sampler:
        facts |= {"sampler": None, "steps": 0}
    folder.mkdir(parents=True)
    write_metrics(folder, facts, results)


@pytest.fixture
def runs(tmp_path):
    evaluation(tmp_path / "vae" / "evaluation", "vae_flowers102", 330.67, sampler=False)
    evaluation(tmp_path / "unet" / "evaluation", "flowers102_seed004", 90.5, data="flowers102_seed004")
    evaluation(tmp_path / "adm" / "evaluation", "flowers102", 120.25)
    evaluation(tmp_path / "few" / "evaluation", "flowers102", 200.0, n=128)
    evaluation(tmp_path / "other" / "evaluation", "celeba", 10.0, digest="bb" * 32, data="celeba")
    evaluation(tmp_path / "val" / "evaluation", "flowers102", 300.0, split="val", N_real=1020)
    return tmp_path


def test_only_what_may_be_compared_stands_together(runs):
    board = collect(runs)
    found = {board.title(setting): [entry.model for entry in entries] for setting, entries in board.groups.items()}
    assert len(found) == 4
    flowers = next(models for title, models in found.items() if "500 images against 6,149" in title and "flow" in title)
    # One content under two names is one group, and the best FID comes first.
    assert flowers == ["flowers102_seed004", "flowers102", "vae_flowers102"]
    assert [m for title, m in found.items() if "128 images" in title] == [["flowers102"]]
    assert [m for title, m in found.items() if "split val" in title] == [["flowers102"]]
    assert [m for title, m in found.items() if "celeba" in title] == [["celeba"]]


def test_a_split_by_another_name_is_the_same_group(runs):
    # flowers102 trains on what the authors call test, and the baseline does not.
    before = {setting: len(entries) for setting, entries in collect(runs).groups.items()}
    evaluation(runs / "swapped" / "evaluation", "flowers102_swapped", 60.0, split="test")
    after = {setting: len(entries) for setting, entries in collect(runs).groups.items()}
    assert set(after) == set(before)
    assert max(after.values()) == max(before.values()) + 1


@pytest.mark.parametrize("key", ["weights_sha256", "data_digest", "N_real"])
def test_what_does_not_say_its_reals_is_on_no_board(runs, key):
    before = len(collect(runs).groups)
    evaluation(runs / "blank" / "evaluation", "flowers102", 60.0, **{key: None, "reals": "x"})
    board = collect(runs)
    assert len(board.groups) == before
    assert any("blank" in line for line in board.left_out)


@pytest.mark.parametrize(
    "changes", [{"image_shape": [3, 32, 32]}, {"weights_sha256": "ff" * 32}, {"reals": "other images, as many"}]
)
def test_another_size_inception_or_choice_of_reals_is_another_group(runs, changes):
    before = len(collect(runs).groups)
    evaluation(runs / "more" / "evaluation", "flowers102", 50.0, **changes)
    assert len(collect(runs).groups) == before + 1


def test_a_row_has_every_metric_with_its_deviation_and_verdict(runs):
    board = collect(runs)
    (vae,) = [entry for entries in board.groups.values() for entry in entries if entry.model == "vae_flowers102"]
    expected = ["vae_flowers102", "vae/evaluation", "one call", "330.7 poor", "0.3307 ± 0.0041 good", "", "20.5"]
    assert cells(vae) == expected
    (unet,) = [entry for entries in board.groups.values() for entry in entries if entry.model == "flowers102_seed004"]
    assert cells(unet)[2] == "DDIM 50"
    assert "| vae_flowers102 | vae/evaluation | one call | 330.7 poor |" in markdown(board)


def test_the_command_prints_writes_and_draws(runs, capsys):
    main([str(runs), "--csv", str(runs / "board.csv"), "--picture", str(runs / "board.png")])
    printed = capsys.readouterr().out
    assert "flowers102_seed004" in printed
    assert "FID below 50 good, 20 excellent" in printed
    with (runs / "board.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {(row["model"], row["N"], row["fid"]) for row in rows} >= {("flowers102", "128", "200.0")}
    assert all(row["is"] == "" and row["diversity"] == "20.5" for row in rows)
    assert Image.open(runs / "board.png").width > 1000
    main([str(runs), "--markdown"])
    assert capsys.readouterr().out.count("| model | run |") == 4


def test_runs_of_one_experiment_are_told_apart_in_the_picture(runs):
    evaluation(runs / "again" / "evaluation", "flowers102", 130.0)
    panels = [panel for panel in draw(collect(runs)).axes if "FID" in panel.get_title()]
    labels = [[label.get_text() for label in panel.get_yticklabels()] for panel in panels]
    assert [
        "flowers102_seed004 (DDIM 50)",
        "flowers102 (DDIM 50), adm/evaluation",
        "flowers102 (DDIM 50), again/evaluation",
        "vae_flowers102 (one call)",
    ] in labels
    assert ["flowers102 (DDIM 50)"] in labels


def test_the_picture_says_which_diversity_it_has_and_what_the_lines_are(runs):
    figure = draw(collect(runs))
    titles = [panel.get_title() for panel in figure.axes]
    assert titles[:4] == ["FID ↓", "KID ↓", "Inception Score ↑", "diversity, random pairs"]
    (legend,) = figure.subfigs[-1].legends
    assert [text.get_text() for text in legend.get_texts()][:3] == [
        "good (seed 004's words)",
        "excellent",
        "± deviation",
    ]


def test_what_has_no_fid_is_named(runs, capsys, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    (alone / "x").mkdir()
    write_metrics(alone / "x", RUN, {"fid_30": Result(None, "lower", note="left out")})
    with pytest.raises(AntherError, match=r"no evaluation with an FID.*has no FID"):
        main([str(alone)])
    (runs / "vae" / "evaluation" / "metrics.json").write_text("{")
    main([str(runs)])
    assert "left out:" in capsys.readouterr().out
