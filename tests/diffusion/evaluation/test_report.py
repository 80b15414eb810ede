import csv
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch

from diffusion.errors import AntherError
from diffusion.evaluation.metric import Result
from diffusion.evaluation.report import (
    GALLERY,
    Key,
    print_metrics,
    read_metrics,
    split_key,
    write_metrics,
    write_report,
)
from tests.diffusion.evaluation.fake_run import CLIP, RUN, make_run, results

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NASTY = ("<script>document.title = 'hit'</script>", 'a "rose" | it\'s & more <b>', "{{ 7 * 6 }}")


def strict(path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("key", "parts"),
    [
        ("fid_500", Key("fid", 500)),
        ("kid_std_64", Key("kid_std", 64)),
        (f"clip_score_100_500/{CLIP}", Key("clip_score_100", 500, CLIP)),
        (f"clip_score_100/{CLIP}", Key("clip_score", 100, CLIP)),
        (f"clip_score_100_100/{CLIP}", Key("clip_score_100", 100, CLIP)),
        ("clip_score_8/tiny_2/x_3", Key("clip_score", 8, "tiny_2/x_3")),
        ("diversity_pairs_500", Key("diversity_pairs", 500)),
        ("something", Key("something")),
    ],
)
def test_keys_fall_into_their_parts(key, parts):
    assert split_key(key) == parts


def test_metrics_come_back_as_they_were(tmp_path):
    frame = make_run(tmp_path)
    written = results(frame)
    write_metrics(tmp_path, RUN, written)
    run, read = read_metrics(tmp_path)
    assert run == RUN
    assert read == written
    assert list(read) == list(written)
    assert strict(tmp_path / "metrics.json")["metrics"]["kid_30"]["better"] == "lower"
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["key"] for row in rows] == list(written)
    for row, result in zip(rows, written.values(), strict=True):
        assert (float(row["value"]) if row["value"] else None) == result.value
        assert (row["verdict"], row["note"]) == (result.verdict or "", result.note or "")


def test_no_number_is_no_json_and_is_explained(tmp_path):
    write_metrics(
        tmp_path,
        {"validation_loss": math.nan, "T": np.int64(400), "file": Path("a/b"), "shape": (3, torch.tensor(8))},
        {
            "fid_8": Result(math.nan, "lower", None, "few images", {"ratio": math.inf, "N": np.int64(8)}),
            "kid_8": Result(-math.inf, "lower"),
            "is_8": Result(np.float32(2.5), "higher"),
        },
    )
    document = strict(tmp_path / "metrics.json")
    assert document["run"] == {"validation_loss": None, "T": 400, "file": "a/b", "shape": [3, 8]}
    assert document["metrics"]["fid_8"]["value"] is None
    assert document["metrics"]["fid_8"]["note"] == "few images; the computation gave nan"
    assert document["metrics"]["fid_8"]["protocol"] == {"ratio": None, "N": 8}
    assert document["metrics"]["kid_8"]["note"] == "the computation gave -inf"
    assert read_metrics(tmp_path)[1]["is_8"].value == 2.5
    assert "nan" not in (tmp_path / "metrics.csv").read_text().replace("gave nan", "")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"run": {}}', '{"run": {}, "metrics": {"a": {"value": NaN}}}', '{"metrics": {"a": 3}}']
)
def test_damaged_metrics_are_named(tmp_path, text):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(AntherError, match=r"metrics\.json is damaged"):
        read_metrics(tmp_path)


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(AntherError, match=r"there is no .*metrics\.json"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("columns", ["40", "160"])
def test_what_is_printed_holds_everything(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    note = "see [1] and [/red]"
    twice = {"recall_30": Result(0.5, "higher", None, note), "precision_30": Result(0.25, "higher", None, note)}
    found = {**results(make_run(tmp_path)), **twice}
    print_metrics(found)
    lines = capsys.readouterr().out.splitlines()
    for key, result in found.items():
        (line,) = [line for line in lines if line.split("  ")[0] == key]
        assert result.value is None or f"{result.value:.4g}" in line
        assert (result.verdict or "") in line
        assert ("↑" in line, "↓" in line) == (result.better == "higher", result.better == "lower")
        if result.note:
            (place,) = [line.split()[0] for line in lines if line.partition("] ")[2] == result.note]
            assert line.rstrip().endswith(place)
        else:
            assert not line.rstrip().endswith("]")


class Page(HTMLParser):
    """Tags with their attributes, and the gallery as (attributes, picture, text)."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.figures, self.text, self._open = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "figure" and "data-id" in attributes:
            self._open = True
            self.figures.append([attributes, None, ""])
        if self._open and tag == "img":
            self.figures[-1][1] = unquote(attributes["src"])

    def handle_endtag(self, tag):
        self._open = self._open and tag != "figure"

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.figures[-1][2] += data


@pytest.fixture
def reported(tmp_path):
    frame = make_run(tmp_path / "run 1", prompts=NASTY)
    found = results(frame)
    found["fid_30"] = Result(87.5, "lower", "poor (not below 50)", "<script>alert(1)</script>", {"<i>": "<u>"})
    write_metrics(tmp_path / "run 1", {**RUN, "prompts": list(NASTY)}, found)
    (tmp_path / "run 1" / "plots").mkdir()
    (tmp_path / "run 1" / "plots" / "grid.png").write_bytes((tmp_path / "run 1/images/000000.png").read_bytes())
    write_report(tmp_path / "run 1", "python -m app 'run 1'")
    return tmp_path / "run 1", frame, found


def test_each_image_has_its_own_prompt_and_scores(reported):
    folder, frame, _ = reported
    page = Page((folder / "report.html").read_text())
    assert len(page.figures) == len(frame)
    for (attributes, picture, text), row in zip(page.figures, frame.itertuples(), strict=True):
        assert picture == row.file
        assert attributes["data-prompt"] == row.prompt
        assert row.prompt in text
        for name in ("clip_score", "nearest_distance", "uniqueness", "representativeness_closeness"):
            assert float(attributes[f"data-{name}"]) == getattr(row, name)
        assert f"CLIP {row.clip_score:.4g}" in text
        assert f"seed {row.seed}" in text


def test_the_page_says_everything_and_needs_nothing(reported):
    folder, _, found = reported
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<i>" in page.text
    assert "{{ 7 * 6 }}" in page.text
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    made_later = {"dataset", "imagefolder", "protocol.json"}
    for link in links:
        assert ":" not in link
        assert not link.startswith("/")
        path = unquote(link.split("#")[0])
        assert not path or path in made_later or (folder / path).exists()
    assert "plots/grid.png" in links
    assert "plots/best.png" not in links
    for key, result in found.items():
        assert key in page.text
        assert (result.note or "") in page.text
        assert (result.verdict or "") in page.text
    assert "87.5" in page.text
    assert "↓ lower is better" in page.text
    assert "± 0.002" in page.text
    for fact in (RUN["checkpoint"], RUN["checkpoint_sha256"], "diffusion.samplers.ddim.DDIM", "cropped_flowers"):
        assert fact in page.text
    assert "python -m app 'run 1'" in page.text
    assert page.text.count("not there when this page was written") == len(made_later)


def test_scores_that_an_image_does_not_have_are_left_out(tmp_path):
    make_run(tmp_path, 3, prompts=None, clip_score=[0.1, np.nan, 0.3], uniqueness=None)
    write_metrics(tmp_path, {**RUN, "guidance_weight": None, "prompts": None}, {})
    page = Page(write_report(tmp_path).read_text())
    assert ["data-clip_score" in figure[0] for figure in page.figures] == [True, False, True]
    assert "nan" not in "".join(figure[2] for figure in page.figures)
    assert "guidance weight w" not in page.text
    assert "uniqueness" not in page.text
    assert "FiftyOne App:" not in page.text


def test_a_large_gallery_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.evaluation.report.GALLERY", 4)
    make_run(tmp_path, 6)
    write_metrics(tmp_path, RUN, {})
    page = Page(write_report(tmp_path).read_text())
    assert [figure[1] for figure in page.figures] == [f"images/00000{k}.png" for k in range(4)]
    assert "The first 4 of 6 images" in page.text
    assert GALLERY >= 1000


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")
def test_a_browser_sorts_and_filters_the_images(reported):
    sync_api = pytest.importorskip("playwright.sync_api")
    folder, frame, _ = reported
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.goto((folder / "report.html").as_uri())

        def shown():
            return [
                figure.get_attribute("data-id")
                for figure in page.query_selector_all("#gallery figure")
                if figure.is_visible()
            ]

        assert shown() == [str(k) for k in range(30)]
        page.select_option("#by", "clip_score")
        assert shown() == [str(k) for k in frame["clip_score"].argsort()]
        page.check("#down")
        assert shown() == [str(k) for k in (-frame["clip_score"]).argsort()]
        page.select_option("#by", "id")
        page.select_option("#of", NASTY[0])
        assert shown() == [str(k) for k in range(27, -1, -3)]
        loaded = "[...document.images].filter(i => i.complete && i.naturalWidth == 0).length"
        assert page.evaluate(loaded) == 0
        assert page.title() == "Evaluation of flowers"
        assert not faults
        browser.close()
