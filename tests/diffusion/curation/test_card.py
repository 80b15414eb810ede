import functools
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from markdown_it import MarkdownIt
from PIL import Image

from datamodules.folders import FolderImages
from diffusion import settings
from diffusion.assets import AssetError, cache_dir, resolve
from diffusion.conditioning.labels import Labels
from diffusion.curation.card import SAMPLERS, card, preview, text
from diffusion.denoiser import Denoiser
from diffusion.evaluation import scoring
from diffusion.evaluation.distribution import without_fc
from diffusion.evaluation.report import write_metrics
from diffusion.evaluation.run import make_plan, protocol
from diffusion.evaluation.scoring import Scorers
from diffusion.evaluation.subject import Subject
from diffusion.modules.diffusion import ClassifierFreeDiffusion, Diffusion
from diffusion.networks.unet import UNet
from diffusion.samplers import DDPM
from diffusion.schedules import Linear

CONF = Path(__file__).parents[3] / "conf"

# The YAML of seed 001, "Step 1 — Add YAML Metadata", between its two lines of dashes.
SEEDS = """\
dataset_info:
  configs:
  - config_name: default
    data_files:
    - split: test
      path: "test/samples.json"
"""

HOSTILE = (
    "a rose | a lily",
    "first line\nsecond line",
    "---\nlicense: mit",
    "`code` **bold** _it_ [link](x) <b>html</b> ~~no~~ #1 & &amp; $x$ \\| back\\slash",
    "'quoted' \"twice\": {a: [1]} - *anchor !!tag %",
    "маки 向日葵 \U0001f33b",
    "```\nfence",
)

RUN = {
    "experiment": "flowers",
    "checkpoint": "/home/somebody/secret place/best.ckpt",
    "checkpoint_sha256": "c4" * 32,
    "validation_loss": 0.0888,
    "parameters": 34122243,
    "T": 500,
    "image_shape": [3, 8, 8],
    "prompts": list(HOSTILE),
    "num_images": 14,
    "seed": 100,
    "guidance_weight": 3.0,
    "sampler": {"_target_": "diffusion.samplers.DDIM", "eta": 0.25},
    "steps": 50,
    "embedding": {"layer": "down2", "form": "flat"},
    "data": "cropped_flowers",
    "data_digest": "ab12",
    "conditioner": "clip ViT-B-32",
    "versions": {"torch": "2.13.0"},
    "seconds": 12.5,
    "made": "2026-01-02",
}
NO_FC = without_fc(SimpleNamespace(weights_hash="ab" * 32))
METRICS = {
    "clip_score_14/ViT-B-32|x": {
        "value": 0.27301234,
        "better": "higher",
        "verdict": None,
        "note": "the scorer is the conditioning model | see\nthe protocol",
        "protocol": {"model": "ViT-B-32", "prompt": "```\n| a"},
    },
    "fid_14": {
        "value": 87.5,
        "better": "lower",
        "verdict": "moderate (50 to 100)",
        "note": None,
        "protocol": {"N": 14},
    },
    "is_14": {"value": None, "better": "higher", "verdict": None, "note": NO_FC, "protocol": {}},
}


@pytest.fixture
def make(tmp_path):
    def make(prompts=HOSTILE, run=RUN, metrics=METRICS, n=14, channels=3) -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        rows = []
        for k in range(n):
            shape = (8, 8, 3) if channels == 3 else (8, 8)
            pixels = np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"images/{k:06d}.png")
            rows.append({"id": f"{k:06d}", "seed": 100 + k, "file": f"images/{k:06d}.png", "clip_score": k / 10})
            rows[-1]["prompt"] = prompts[k % len(prompts)] if prompts else None
        pd.DataFrame(rows).to_parquet(tmp_path / "records.parquet")
        (tmp_path / "metrics.json").write_text(json.dumps({"run": run, "metrics": metrics}))
        return tmp_path

    return make


def split(readme):
    match = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
    return match[1] + "\n", readme[match.end() :]


def tables(body):
    """Every table as rows of the plain text that a reader of the rendered page sees."""
    found, inside = [], False
    for token in MarkdownIt("commonmark").enable("table").parse(body):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            inside = True
        elif token.type == "inline" and inside:
            inside = False
            assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def shown(value):
    return " ".join(str(value).split())


def test_header(make):
    header, _ = split(card(make(), "me/flowers", "T: {x} # y\n'z' | w", "CC-BY-4.0"))
    assert header.startswith(SEEDS)
    data = yaml.safe_load(header)
    assert data["dataset_info"] == yaml.safe_load(SEEDS)["dataset_info"]
    assert data["configs"] == [
        {"config_name": "default", "data_files": [{"split": "test", "path": "test/data/*"}]},
    ]
    assert data["pretty_name"] == "T: {x} # y 'z' | w"
    assert data["license"] == "cc-by-4.0"
    assert "fiftyone" in data["tags"]
    assert data["task_categories"] == ["text-to-image"]
    assert data["size_categories"] == ["n<1K"]
    # A second reader, the hub client's own.
    from huggingface_hub import DatasetCard

    assert DatasetCard(card(make(), "me/flowers", "x", "mit")).data.license == "mit"


@pytest.mark.parametrize(
    ("licence", "identifier", "name"),
    [
        ("MIT", "mit", None),
        ("All rights | reserved: me", "other", "all-rights-reserved-me"),
        ("unknown", "unknown", None),
    ],
)
def test_licence(make, licence, identifier, name):
    header, body = split(card(make(), "me/flowers", "x", licence))
    data = yaml.safe_load(header)
    assert data["license"] == identifier
    assert data.get("license_name") == name
    section = body.rpartition("## Licence")[2]
    assert text(licence) in section or (licence == "unknown" and "None was stated" in section)


def test_tables_say_what_the_files_say(make):
    _, body = split(card(make(), "me/flowers", "A | title\n---", "mit"))
    metrics, facts, prompts = tables(body)
    assert metrics == [
        ["metric", "value", "better", "verdict", "note"],
        ["clip_score_14/ViT-B-32|x", "0.273", "higher", "", shown(METRICS["clip_score_14/ViT-B-32|x"]["note"])],
        ["fid_14", "87.5", "lower", "moderate (50 to 100)", ""],
        ["is_14", "–", "higher", "", NO_FC],
    ]
    facts = dict(facts[1:])
    assert facts["checkpoint"] == "best.ckpt"
    assert facts["checkpoint, sha256"] == "c4" * 32
    assert facts["seeds"] == "100 to 113, one per image"
    assert facts["guidance weight"] == "3"
    assert json.loads(facts["sampler"]) == RUN["sampler"]
    assert facts["steps"] == "50"
    assert facts["parameters"] == "34122243"
    assert prompts[1:] == [[shown(prompt), "2"] for prompt in HOSTILE]
    headings = [line for line in body.splitlines() if line.startswith("#")]
    names = ["Metrics", "How it was made", "How to load it", "Limitations", "Protocol", "Licence"]
    assert headings == ["# A \\| title ---", *(f"## {name}" for name in names)]


def test_protocol_is_whole_and_no_folder_of_this_machine_is_told(make):
    readme = card(make(), "me/flowers", "x", "mit")
    tokens = MarkdownIt("commonmark").parse(readme.partition("## Protocol")[2])
    (block,) = [token.content for token in tokens if token.type == "fence"]
    assert json.loads(block) == {
        "run": RUN | {"checkpoint": "best.ckpt"},
        "metrics": {key: metric["protocol"] for key, metric in METRICS.items()},
    }
    assert "somebody" not in readme
    assert str(cache_dir()) not in readme
    assert str(Path.home()) not in readme
    assert str(make()) not in readme


def test_how_it_was_made_and_loaded(make):
    readme = card(make(), "me/flowers", "x", "mit")
    assert overrides_of(readme)[0] == "ckpt=best.ckpt"
    assert 'snapshot_download("me/flowers", repo_type="dataset")' in readme
    assert 'load_dataset("me/flowers", split="test")' in readme
    assert "](preview.png)" in readme
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(code) == 2
    for block in code:
        compile(block, "card", "exec")


# The command ----------------------------------------------------------------------------------------------------------


def overrides_of(readme):
    """The words of the card's command after `evaluate.py`, as bash hands them on."""
    (command,) = re.findall(r"^python evaluate\.py .*$", readme, re.MULTILINE)
    script = command.replace("python evaluate.py", "printf '%s\\0'", 1)
    done = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().split("\0")[:-1]


def composed(overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        # Where a run lies is known to a run of Hydra alone.
        return settings.read(compose("evaluate", [*overrides, "trainer.default_root_dir=."]), settings.Evaluate)


@functools.cache
def subject(conditional=True):
    """A model whose own settings are not those of conf/."""
    network = UNet(T=5, img_ch=3, img_size=8, down_chs=(32, 32, 32), c_embed_dim=2 * conditional, family="handson")
    parts = (Denoiser(network, Linear(T=5)), DDPM(), functools.partial(torch.optim.Adam, lr=1e-3))
    guided = {"weight": 1.5, "interval": (0.5, 3.0), "rescale": 0.25}
    model = ClassifierFreeDiffusion(*parts, Labels(["daisy", "rose"]), **guided) if conditional else Diffusion(*parts)
    sampler = {"_target_": "diffusion.samplers.DDPM", "steps": None, "variance": "beta", "clip": False}
    config = {"module": {"sampler": sampler}, "data": {"classes": ["daisy", "rose"]}}
    return Subject(model, config, "/home/somebody/epoch=3 step=9.ckpt", "ab" * 32, None)


PROMPTS = [
    *HOSTILE,
    *("${oc.env:HOME}", "\\${x}", "\\\\${x} $(id) `id` !!", "${", "ends in \\", "\\'\" \\\"'", "\u202etxt\u00a0\x07"),
    *("null", "True", "1e5", "inf", "a=b", "{a: [b, c]}", "-m", "~x", "a_rose"),
]


@pytest.mark.parametrize(
    ("asked", "conditional"),
    [
        ([], True),
        ([], False),
        (["guidance.interval=[0,inf]", "guidance.rescale=0", "embedding=null"], True),
        (["guidance.weight=2", "guidance.negative=\"a white daisy, [3] and 'more'\""], True),
        (["guidance.weight=2", "guidance.negative=3"], True),
        (["guidance.weight=-0.5", "guidance.interval=[0.3,inf]", "guidance.rescale=1e-5", "seed=7"], True),
        (["guidance.interval=[0.3,5]", "embedding.layer=down0", "embedding.form=flat", "embedding.when=clean"], True),
        (["embedding.when=trace", "embedding.steps=[0,2]", "batch_size=3", "trainer.precision=bf16-mixed"], False),
        (["trainer.precision=16-true"], False),
        (["+sampler={_target_:diffusion.samplers.ddim.DDIM,eta:0.25,grid:karras}"], False),
        (["sampler=ddim", "+sampler.grid=karras", "sampler.eta=0.5"], False),
        (["sampler=ddpm", "sampler.steps=4", "sampler.variance=beta_prev"], False),
        *(([f"sampler={path.stem}"], False) for path in sorted(CONF.glob("sampler/*.yaml"))),
    ],
)
def test_the_command_draws_the_same_images(make, asked, conditional):
    """The command of the card, through bash and Hydra, makes the protocol that the run recorded."""
    one = subject(conditional)
    there = composed(["ckpt=x", "num_images=14", *asked])
    there["prompts"] = PROMPTS if conditional else None
    precision = there["trainer"]["precision"]
    recorded = protocol(make_plan(there, one, None))
    folder = make(prompts=PROMPTS if conditional else None)
    write_metrics(folder, {"checkpoint": one.path, **recorded, "precision": precision}, {})
    overrides = overrides_of(card(folder, "me/flowers", "x", "mit"))
    here = composed(overrides)
    assert protocol(make_plan(here, one, None)) == recorded
    assert (here["ckpt"], here["trainer"]["precision"]) == ("epoch=3 step=9.ckpt", precision)
    assert any(word.startswith("trainer.precision=") for word in overrides) == (precision != "32-true")


@pytest.fixture
def data(tmp_path, request):
    """A few pictures of as many channels as asked, in the splits of a data set."""
    channels = request.param
    for k in range(30):
        shape = (28, 28, 3) if channels == 3 else (28, 28)
        pixels = np.random.default_rng(k).integers(0, 256, shape, dtype=np.uint8)
        (tmp_path / f"photos/{k % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"photos/{k % 2}/{k}.png")
    split = {"train": 0.5, "val": 0.25, "test": 0.25}
    photos = FolderImages(path=str(tmp_path / "photos"), size=28, channels=channels, batch_size=2, seed=0, split=split)
    photos.setup()
    return photos


@pytest.mark.parametrize(
    ("asked", "conditional", "data"),
    [
        (["protocol=demo", "inception.few_images=allow", "num_images=14"], True, 3),
        (["inception.one_channel=repeat", "inception.few_images=allow", "inception.split=val"], False, 1),
        (["protocol=mnist", "nearest.split=test", "classifier.split=val"], False, 1),
        (["protocol=mnist", "classifier.threshold=0.5", "nearest=null"], False, 1),
        (["clip=null", "inception=null", "nearest=null"], True, 1),
    ],
    indirect=["data"],
)
def test_the_command_scores_as_the_run_did(make, asked, conditional, data):
    """Few images and grey ones, which are refused unless something is said, are taken by the command of the card."""
    one, there = subject(conditional), composed(["ckpt=x", "num_images=14", *asked])
    if there["inception"] is not None:
        try:
            resolve("fid_inception")
        except AssetError as error:
            pytest.skip(str(error))
    recorded = Scorers(there, one, data, "cpu").identity
    folder = make(prompts=None)
    write_metrics(folder, {**RUN, "prompts": None, "scored_with": recorded}, {})
    here = composed(overrides_of(card(folder, "me/flowers", "x", "mit")))
    assert Scorers(here, one, data, "cpu").identity == recorded


@pytest.mark.parametrize("data", [3], indirect=True)
def test_the_command_leaves_out_the_inception_that_was_missing(make, data, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "load_extractor", lambda *_: resolve(str(tmp_path / "nowhere.pth")))
    few = ["num_images=14", "clip=null", "nearest=null", "inception.few_images=allow"]
    there = composed(["ckpt=x", *few, "inception.missing=leave_out"])
    recorded = Scorers(there, subject(True), data, "cpu").identity
    folder = make(prompts=None)
    write_metrics(folder, {**RUN, "prompts": None, "scored_with": recorded}, {})
    here = composed(overrides_of(card(folder, "me/flowers", "x", "mit")))
    assert Scorers(here, subject(True), data, "cpu").identity == recorded


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("ddim", "ddim"),
        ("ddpm", "ddpm"),
        ("dpmpp", "dpmpp"),
        ("dpmpp_sde", "dpmpp"),
        ("euler", "euler"),
        ("heun", "heun"),
    ],
)
def test_samplers_are_named_as_options(make, asked, named):
    record = composed(["ckpt=x", f"sampler={asked}"])["sampler"]
    overrides = overrides_of(card(make(run=RUN | {"sampler": record}), "me/flowers", "x", "mit"))
    assert f"sampler={named}" in overrides
    assert {word.split("=")[0] for word in overrides if "sampler." in word} == {
        f"sampler.{key}" for key in record if key != "_target_"
    }
    assert (SAMPLERS / f"{asked}.yaml").exists()


def test_what_no_override_says_is_said_in_words(make):
    def section(**run):
        made = card(make(run=RUN | run), "me/flowers", "x", "mit").partition("## How it was made\n\n")[2]
        return made.partition("\n|")[0]

    assert section().strip().endswith("```")
    assert f"`guidance.bad=`, the path of the worse model, whose sha256 is {'d5' * 32}." in section(
        guidance_bad_sha256="d5" * 32
    )
    assert "`model=`" in section(checkpoint="/home/somebody/unet.pth")
    scorers = {
        "clip": {"name": "ViT-B-32/mine.safetensors", "weights": "a7" * 32},
        "classifier": {"classifier": "own.pth", "weights_sha256": "b8" * 32, "threshold": 0.5, "split": "test"},
    }
    said = section(scored_with=scorers)
    assert f"mine.safetensors stands for a file of weights, whose sha256 is {'a7' * 32}." in said
    assert f"own.pth stands for a file of weights, whose sha256 is {'b8' * 32}." in said
    back = section(prompts=None, reconstruct="val", data_digest="e6" * 32, originals_digest="f7" * 32, seed=None)
    assert "seed=" not in back
    assert composed(overrides_of(back))["reconstruct"] == "val"
    assert f"digest {'e6' * 32}; `data.path=`" in back


@pytest.mark.parametrize("prompts", [["a rose " * 20_000], ["nul\0"]])
def test_prompts_that_no_command_holds_are_left_to_a_file(make, prompts):
    readme = card(make(run=RUN | {"prompts": prompts}), "me/flowers", "x", "mit")
    assert "prompts=prompts.yaml" in overrides_of(readme)
    assert "`prompts.yaml` stands for" in readme


def test_limitations(make):
    section = card(make(), "me/flowers", "x", "mit").partition("## Limitations")[2].partition("## Protocol")[0]
    assert "8 × 8 pixels" in section
    assert "14 images" in section
    assert "w = 3 " in section
    assert "the scorer is the conditioning model" in section
    assert "determinism is not guaranteed" in section


def test_many_prompts_are_cut_and_none_is_unconditional(make):
    readme = card(make([f"prompt {k}" for k in range(45)], n=50), "me/flowers", "x", "mit")
    assert "5 more prompts are in `records.parquet`." in readme
    readme = card(make(None, run={"checkpoint": None}), "me/flowers", "x", "mit")
    assert yaml.safe_load(split(readme)[0])["task_categories"] == ["unconditional-image-generation"]
    assert len(tables(split(readme)[1])) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_preview_shows_the_images(make, channels):
    folder = make(n=14, channels=channels)
    page = np.asarray(preview(folder))
    for name in ("000000", "000013"):
        pixels = np.asarray(Image.open(folder / f"images/{name}.png").convert("RGB"))
        large = pixels.repeat(18, 0).repeat(18, 1)
        windows = np.lib.stride_tricks.sliding_window_view(page[..., 0], (1, 144))[:, :, 0]
        places = np.argwhere((windows == large[0, :, 0]).all(-1))
        assert any(np.array_equal(page[y : y + 144, x : x + 144], large) for y, x in places)
    assert page.shape[1] == 4 * 150 + 6
