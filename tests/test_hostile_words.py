"""Prompts and names of classes and runs are shown and stored as they are: never a path, never markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from callbacks.samples import sheet
from datamodules.folders import FolderImages
from diffusion.curation import card
from diffusion.curation.export import export_imagefolder
from diffusion.evaluation.plots import draw_plots
from diffusion.evaluation.report import write_metrics, write_report
from tests.diffusion.evaluation.fake_run import RUN, make_run, results

PROMPTS = (
    "../../escaped",
    "/etc/passwd",
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"' onmouseover='alert(1)' \"",
    "</option></select><svg onload=alert(1)>",
    "line\nline\r\n\ttab",
    "nul\0bell\a",
    "🌹 роза بنفسجي \u202eesrever",
    "$\\frac{1}{0$ and $x_",
    "[bold]a rose[/nothing]",
    "{{ 7 * 7 }} {% raw %} ${oc.env:HOME} %s {0}",
    "=HYPERLINK(\"http://127.0.0.1\")",
    "- key: [value\n---\n# heading",
    "javascript:alert(1)",
    "| a | b |\n```\n<b>",
    "long " * 2000,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose every word is hostile, two folders below the one that is watched."""
    folder = tmp_path_factory.mktemp("watched") / "runs" / "mine"
    n = len(PROMPTS)  # below what UMAP is taken for, which takes long to compile
    frame = make_run(folder, n, PROMPTS)
    frame["label"] = [PROMPTS[k % len(PROMPTS)] if k % 3 else None for k in range(n)]
    frame["nearest_real"] = [f"{PROMPTS[k % len(PROMPTS)]}/1.jpg" for k in range(n)]
    frame.to_parquet(folder / "records.parquet")
    facts = {**RUN, "prompts": list(PROMPTS), "num_images": n, "experiment": PROMPTS[3], "data": PROMPTS[2]}
    facts["conditioner"] = facts["checkpoint"] = PROMPTS[3]
    write_metrics(folder, facts, results(frame, n))
    draw_plots(folder, None)
    write_report(folder, f"python -m diffusion.curation.app '{PROMPTS[3]}'")
    export_imagefolder(folder)
    return folder


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_the_report_shows_words_and_runs_none(run: Path) -> None:
    page = Page((run / "report.html").read_text("utf-8"))
    assert page.tags.count("script") == 1
    assert not {"svg", "iframe", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value or "" for name, value in page.attributes if name in ("href", "src")]
    assert links
    for link in links:
        assert re.match(r"(images/\d{6}\.png|plots/\w+\.png|#\w+|[\w.]+)$", link), link
    shown = [value for name, value in page.attributes if name == "data-prompt"]
    # A browser reads a line's end its own way, and no NUL.
    plain = [re.sub(r"\r\n?", "\n", prompt) for prompt in PROMPTS]
    assert [re.sub(r"\r\n?", "\n", text or "") for text in shown] == plain
    for prompt in PROMPTS[:6]:
        assert prompt in page.text


def test_files_are_named_by_number(run: Path) -> None:
    watched = run.parents[1]
    names = {path.name for path in watched.rglob("*") if path.is_file()}
    allowed = r"\d{6}\.png|\w+\.(png|json|csv|html|parquet|npy)"
    assert [name for name in names if not re.fullmatch(allowed, name)] == []
    assert {path.name for path in watched.iterdir()} == {"runs"}
    assert {path.name for path in watched.parent.iterdir() if path.name.startswith("escaped")} == set()


def test_the_card_is_what_it_seems(run: Path) -> None:
    title = PROMPTS[3]
    text = card.card(run, "me/flowers", title, "<b>mine</b>: all\n---")
    head, body = text.split("---\n", 2)[1:] if text.startswith("---\n") else ("", "")
    header = yaml.safe_load(head)
    assert header["pretty_name"] == title
    assert header["license"] == "other"
    assert header["configs"][0]["data_files"][0]["path"] == "test/data/*"
    outside = re.sub(r"^```.*?^```$", "", body, flags=re.S | re.M)
    # Markdown passes tags on; all that is left is our own.
    tags = re.findall(r"(?<!\\)<(/?\w+)", outside)
    assert set(tags) <= {"details", "/details", "summary", "/summary"}, tags
    assert body.count("\n# ") <= 1
    assert len(re.findall(r"^```", body, flags=re.M)) % 2 == 0
    protocol = json.loads(re.search(r"```json\n(.*?)\n```", body, flags=re.S)[1])
    assert protocol["run"]["experiment"] == PROMPTS[3]
    assert card.preview(run).size > (100, 100)


def test_records_and_the_image_folder_hold_the_words_as_they_are(run: Path) -> None:
    for path in (run / "records.parquet", run / "imagefolder" / "test" / "metadata.parquet"):
        frame = pd.read_parquet(path)
        assert frame["prompt"].tolist() == list(PROMPTS)
        assert frame["label"].tolist()[1] == PROMPTS[1]


def test_no_table_for_spreadsheets_holds_a_prompt(run: Path) -> None:
    """CSV files are for programs, so texts stand in them as they are; prompts stand in parquet and JSON alone."""
    content = (run / "metrics.csv").read_text()
    assert not [prompt for prompt in PROMPTS if prompt in content]


def test_grids_take_any_caption() -> None:
    import torch

    captions = list(PROMPTS)
    picture = sheet(torch.zeros(len(captions), 3, 8, 8), captions, 4)
    assert min(picture.size) > 8


def test_class_folders_are_names(tmp_path: Path) -> None:
    """What a file system takes for a folder's name may still be markup or a template."""
    root = tmp_path / "flowers"
    names = ["<img src=x onerror=alert(1)>", "{noun}", "[bold]x[none]", "=1+1", "a\nb", "🌹"]
    for name in names:
        (root / name).mkdir(parents=True)
        for k in range(4):
            Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(root / name / f"{k}.png")
    data = FolderImages(batch_size=2, seed=0, size=8, path=str(root), split={"train": 0.5, "val": 0.5})
    data.prepare_data()
    data.setup()
    assert data.class_names == tuple(sorted(names))
    assert "{noun}" in {name for name in data.class_names if name in data.caption(name)}
    data.save_splits(tmp_path / "splits.json")
    assert json.loads((tmp_path / "splits.json").read_text())["classes"] == sorted(names)


def test_what_is_announced_is_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    from diffusion.evaluation.run import _announce

    subject = SimpleNamespace(config={"name": "[/x]"}, parameters=1, path="[bold]p")
    how = {"sampler": None, "steps": 1, "weight": None, "originals": None, "model_config_sha256": None}
    plan = SimpleNamespace(prompts=PROMPTS[10:12], num_images=1, first_seed=0, **how)
    _announce(subject, plan, SimpleNamespace(describe=lambda: {"score": "[/]"}, other_splits=["[val]"]), tmp_path)
    printed = capsys.readouterr().out
    assert "[bold]a rose[/nothing]" in printed
    assert "[/x]" in printed
    assert "other images in [val]" in printed
