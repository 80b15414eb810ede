"""sample.py as a person runs it."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.files import sha256
from tests.e2e.conftest import ROOT

Call = Callable[..., Path]


def test_grid_singles_record_and_animation(trained: Path, call: Call, capfd: pytest.CaptureFixture[str]) -> None:
    folder = call(
        "sample.py",
        f"ckpt={trained}",
        "prompts=[a red rose, two white daisies]",
        "guidance.weight=2",
        "sampler=ddim",
        "sampler.steps=4",
        "num_images=2",
        "seed=5",
        "gif=true",
    )
    assert str(folder / "grid.png") in capfd.readouterr().out
    record = json.loads((folder / "samples.json").read_text())
    assert [(r["prompt"], r["seed"]) for r in record["images"]] == [
        ("a red rose", 5),
        ("a red rose", 6),
        ("two white daisies", 7),
        ("two white daisies", 8),
    ]
    for row in record["images"]:
        assert Image.open(folder / row["file"]).size == (32, 32)
    assert Image.open(folder / "trajectory.gif").n_frames == 5


def test_another_request_in_the_same_folder_leaves_nothing_of_the_one_before(
    trained: Path, call: Call, tmp_path: Path
) -> None:
    (tmp_path / "run" / "images").mkdir(parents=True)
    (tmp_path / "run" / "images" / "mine.png").write_bytes(b"")
    common = [f"ckpt={trained}", "prompts=[a red rose]", "sampler.steps=2"]
    call("sample.py", *common, "num_images=3", "gif=true")
    (tmp_path / "run" / "samples.json").unlink()  # as of one that was killed while it wrote
    folder = call("sample.py", *common, "num_images=2")
    assert {path.name for path in (folder / "images").iterdir()} == {"00000.png", "00001.png", "mine.png"}
    assert not (folder / "trajectory.gif").exists()


def test_images_that_are_no_numbers_are_not_saved_as_black_ones(
    trained: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    words = ["prompts=[a red rose]", "sampler.steps=3", "sampler.clip=false", "guidance.weight=1e39"]
    assert "image 0 holds numbers that are not finite" in refused("sample.py", f"ckpt={trained}", *words)
    assert not (tmp_path / "run" / "images").exists()


def test_the_folder_of_an_evaluation_is_left_alone(trained: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "records.parquet").write_bytes(b"")
    assert "holds an evaluation" in refused("sample.py", f"ckpt={trained}", "prompts=[a red rose]")


def test_an_image_is_a_function_of_its_seed_in_any_batch_split(trained: Path, call: Call, tmp_path: Path) -> None:
    common = [f"ckpt={trained}", "prompts=[a red rose]", "sampler=ddpm", "sampler.steps=3"]
    three = call("sample.py", *common, "num_images=3", "batch_size=2", folder=tmp_path / "three")
    one = call("sample.py", *common, "num_images=1", "seed=2", folder=tmp_path / "one")
    pictures = [np.asarray(Image.open(p), dtype=int) for p in (three / "images/00002.png", one / "images/00000.png")]
    # Equal to rounding of the network's own arithmetic, which may depend on the batch.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_weights_from_elsewhere_draw_as_those_of_the_checkpoint(trained: Path, call: Call, tmp_path: Path) -> None:
    import torch

    saved = torch.load(trained, weights_only=True)["state_dict"]
    torch.save({key.removeprefix("denoiser.network."): value for key, value in saved.items()}, tmp_path / "bare.pth")
    theirs = [f"ckpt={tmp_path / 'bare.pth'}", f"model={trained.parents[1] / '.hydra' / 'config.yaml'}"]
    common = ["prompts=[a red rose]", "sampler.steps=2"]
    drawn = [
        np.asarray(Image.open(call("sample.py", *words, *common, folder=tmp_path / str(k)) / "images/00000.png"))
        for k, words in enumerate([[f"ckpt={trained}"], theirs])
    ]
    assert (drawn[0] == drawn[1]).all()
    assert json.loads((tmp_path / "1" / "samples.json").read_text())["protocol"]["model"] == theirs[1][6:]


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp", "dpmpp_sde"])
def test_every_solver_draws_and_is_recorded(solver: str, trained: Path, call: Call) -> None:
    asked = [f"ckpt={trained}", "prompts=[a red rose]", f"sampler={solver}", "sampler.steps=3", "sampler.grid=logsnr"]
    folder = call("sample.py", *asked, "guidance.interval=[0.1,inf]", "guidance.rescale=0.7")
    protocol = json.loads((folder / "samples.json").read_text())["protocol"]
    assert protocol["sampler"]["grid"] == "logsnr"
    assert protocol["guidance_interval"] == [0.1, float("inf")]
    assert protocol["guidance_rescale"] == 0.7
    assert (folder / "images/00000.png").exists()


def test_a_model_is_led_away_from_another_checkpoint(trained: Path, call: Call, tmp_path: Path) -> None:
    import torch

    content = torch.load(trained, weights_only=True)
    content["state_dict"] = {name: 0.8 * weight for name, weight in content["state_dict"].items()}
    torch.save(content, tmp_path / "worse.ckpt")
    asked = [f"ckpt={trained}", "prompts=[a red rose]", "sampler.steps=3", "guidance.weight=2"]
    drawn = [
        np.asarray(Image.open(call("sample.py", *asked, *more, folder=tmp_path / str(k)) / "images/00000.png"))
        for k, more in enumerate([[f"guidance.bad={tmp_path / 'worse.ckpt'}"], [f"guidance.bad={trained}"], []])
    ]
    assert (drawn[0] != drawn[1]).any()
    protocols = [json.loads((tmp_path / str(k) / "samples.json").read_text())["protocol"] for k in range(3)]
    hashes = [sha256(tmp_path / "worse.ckpt"), sha256(trained), None]
    assert [protocol["guidance_bad_sha256"] for protocol in protocols] == hashes
    # Away from itself is nowhere: that is the model without guidance.
    without = call("sample.py", *asked[:-1], "guidance.weight=0", folder=tmp_path / "without")
    assert np.abs(drawn[1].astype(int) - np.asarray(Image.open(without / "images/00000.png"), dtype=int)).max() <= 1


def test_a_negative_prompt_and_dynamic_thresholding_are_in_the_record(
    trained: Path, call: Call, tmp_path: Path
) -> None:
    asked = [f"ckpt={trained}", "prompts=[a red rose]", "sampler.steps=3", "guidance.weight=2"]
    ways = [["guidance.negative=a white daisy"], ["sampler.clip=0.9"], []]
    folders = [call("sample.py", *asked, *more, folder=tmp_path / str(k)) for k, more in enumerate(ways)]
    pictures = [np.asarray(Image.open(folder / "images/00000.png")) for folder in folders]
    assert (pictures[0] != pictures[2]).any()
    assert (pictures[1] != pictures[2]).any()
    protocols = [json.loads((folder / "samples.json").read_text())["protocol"] for folder in folders]
    assert [protocol["guidance_negative"] for protocol in protocols] == ["a white daisy", None, None]
    assert [protocol["sampler"]["clip"] for protocol in protocols] == [True, 0.9, True]


def test_the_readmes_commands_draw_an_image_anew_and_keep_what_they_should(
    trained: Path, call: Call, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    drawn = np.zeros((32, 32), bool)
    drawn[8:20, 10:30] = True
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    commands = re.findall(r"^python (sample\.py .*image=.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    quick = ["sampler=dpmpp_sde", "sampler.steps=4", "seed=7"]

    def run(command: str, name: str, *more: str) -> tuple[list[np.ndarray], dict[str, object]]:
        at = command.replace("=photo.", f"={tmp_path}/photo.").replace("=mask.", f"={tmp_path}/mask.")
        script, _, *words = shlex.split(at, comments=True)
        folder = call(script, f"ckpt={trained}", *words, *quick, *more, folder=tmp_path / name)
        pictures = [np.asarray(Image.open(path)) for path in sorted((folder / "images").iterdir())]
        return pictures, json.loads((folder / "samples.json").read_text())["protocol"]

    words = ["num_images=2", "prompts=[a red rose, a white daisy]", "gif=true"]
    (whole, other, *more), told = run(commands[0], "whole", *words)
    assert (whole != photo).any()
    assert (whole != other).any()
    # Each row of the sheet is the photo and a prompt's two images; a pixel is 4 wide and high, a gap 6.
    sheet = np.asarray(Image.open(tmp_path / "whole" / "grid.png"))
    assert sheet.shape[1] == 3 * 134 + 6
    for top, row in zip((6, sheet.shape[0] // 2 + 3), ((whole, other), more), strict=True):
        for k, picture in enumerate((photo, *row)):
            assert (sheet[top : top + 128 : 4, 6 + k * 134 :][:, :128:4] == picture).all()
    assert getattr(Image.open(tmp_path / "whole" / "trajectory.gif"), "n_frames", 1) > 2
    assert told["image"] == f"{tmp_path}/photo.png"
    assert told["image_sha256"] == sha256(tmp_path / "photo.png")
    assert (told["strength"], told["mask"], told["mask_sha256"]) == (0.6, None, None)

    (painted,), told = run(commands[1], "painted")
    assert (painted[~drawn] == photo[~drawn]).all()
    assert (painted[drawn] != photo[drawn]).mean() > 0.5
    assert (told["strength"], told["mask_sha256"]) == (1, sha256(tmp_path / "mask.png"))

    (back,), _ = run(commands[0], "back", "strength=0")
    assert (back == photo).all()
    (fresh,), _ = run(commands[0], "fresh", "strength=1")
    without = call("sample.py", f"ckpt={trained}", "prompts=[a red rose]", *quick, folder=tmp_path / "without")
    assert (fresh == np.asarray(Image.open(without / "images/00000.png"))).all()
    protocol = json.loads((without / "samples.json").read_text())["protocol"]
    assert [protocol[name] for name in ("image", "image_sha256", "strength", "mask", "mask_sha256")] == [None] * 5


def test_a_model_of_another_world_cannot_lead(trained: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    import torch

    content = torch.load(trained, weights_only=True)
    content["config"]["module"]["denoiser"]["schedule"] = {"_target_": "diffusion.schedules.Linear", "T": 400}
    torch.save(content, tmp_path / "other.ckpt")
    said = refused("sample.py", f"ckpt={trained}", "prompts=[a red rose]", f"guidance.bad={tmp_path / 'other.ckpt'}")
    assert "guidance.bad" in said
    assert "schedule" in said


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["prompts=[]"], "empty"),
        ([], "prompts"),
        (["prompts=[a red rose]", "num_images=0"], "num_images"),
        (["prompts=[a red rose]", "seed=many"], "whole number"),
        (["prompts=[a red rose]", "trainer.accelerator=tpu"], "trainer=cpu"),
        (["prompts=[a steam engine]"], "steam"),
        (["prompts=[a red rose]", "sampler.eta=2"], "eta"),
        (["prompts=[a red rose]", "sampler=heun", "sampler.grid=even"], "trailing, logsnr, karras"),
        (["prompts=[a red rose]", "guidance.interval=[5,1]"], "guidance.interval"),
        (["prompts=[a red rose]", "guidance.negative=a steam engine"], "steam"),
        (["prompts=[a red rose]", "guidance.negative=''"], "guidance.negative"),
        (["prompts=[a red rose]", "sampler.clip=2"], "sampler.clip"),
    ],
)
def test_bad_input(overrides: list[str], says: str, trained: Path, refused: Callable[..., str], tmp_path: Path) -> None:
    assert says in refused("sample.py", f"ckpt={trained}", *overrides)
    assert not list((tmp_path / "run").glob("*.png"))
