"""Whether a checkpoint fits what is to go on from it."""

import pytest

from diffusion.checkpoint import check_fits, check_goes_on, located
from diffusion.errors import AntherError


def config(path, batch_size=8, **trainer):
    module = {"denoiser": {"loss": "mse"}, "conditioner": {"path": str(path), "prompts": None}}
    return {"seed": 0, "data": {"batch_size": batch_size}, "module": module, "trainer": trainer}


def test_files_of_the_conditioner_are_found_from_other_directories(tmp_path, monkeypatch):
    (tmp_path / "clip.csv").touch()
    monkeypatch.chdir(tmp_path)
    there = located(config("clip.csv"))
    monkeypatch.chdir("/")
    assert there == config(tmp_path / "clip.csv")
    assert located(there) == there
    assert located(config("openai")) == config("openai")
    check_fits({"config": there}, config(tmp_path / "clip.csv"), "last.ckpt")
    with pytest.raises(AntherError, match=r"conditioner\.path"):
        check_fits({"config": there}, config(tmp_path / "other.csv"), "last.ckpt")


def test_a_checkpoint_that_has_a_relative_path_fits_where_it_is_the_same_file(tmp_path, monkeypatch):
    (tmp_path / "clip.csv").touch()
    monkeypatch.chdir(tmp_path)
    check_fits({"config": config("clip.csv")}, config(tmp_path / "clip.csv"), "last.ckpt")
    check_goes_on(config("clip.csv"), config(tmp_path / "clip.csv"), tmp_path)


@pytest.mark.parametrize(
    "same",
    [
        {"batch_size": 4, "devices": 2},
        {"batch_size": 2, "devices": [0, 3], "num_nodes": 2},
        {"batch_size": 4, "devices": 1, "accumulate_grad_batches": 2},
        {"batch_size": 3, "devices": "auto"},  # nobody knows here
    ],
)
def test_other_devices_that_make_the_same_step(same, tmp_path):
    check_goes_on(config("x", devices=1), config("x", **same), tmp_path)


def test_other_devices_that_make_another_step_are_refused(tmp_path):
    with pytest.raises(AntherError, match="images per step = 8 there and 16 here"):
        check_goes_on(config("x", devices=1), config("x", devices=2), tmp_path)
