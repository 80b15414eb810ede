"""Whether a checkpoint fits what is to go on from it."""

from pathlib import Path

import pytest
import torch

from diffusion.build import build
from diffusion.checkpoint import check_fits, check_goes_on, load_model
from diffusion.errors import AntherError


def config(path, batch_size=8, **trainer):
    module = {"denoiser": {"loss": "mse"}, "conditioner": {"path": str(path), "prompts": None}}
    return {"seed": 0, "data": {"batch_size": batch_size}, "module": module, "trainer": trainer}


def test_a_table_is_found_here_and_where_it_lay_in_training(tmp_path, monkeypatch):
    there, here = tmp_path / "there", tmp_path / "here"
    for folder in (there, here):
        folder.mkdir()
    (there / "clip.csv").write_text("path,e0\na.jpg,1\n")
    monkeypatch.chdir(there)
    trained = tiny("clip.csv")
    path = here / "last.ckpt"
    torch.save({"config": trained, "state_dict": build(trained["module"]).state_dict()}, path)
    monkeypatch.chdir(here)
    assert load_model(path).conditioner.files == (there / "clip.csv",)
    # A project that was moved or copied as a whole has its own.
    (here / "clip.csv").write_text("path,e0\na.jpg,1\n")
    (there / "clip.csv").unlink()
    assert load_model(path).conditioner.files == (Path("clip.csv"),)


def tiny(table):
    network = {"_target_": "diffusion.networks.unet.UNet", "T": 4, "img_ch": 3, "img_size": 8, "c_embed_dim": 1}
    network |= {"down_chs": [32, 32, 32], "t_embed_dim": 8, "family": "course"}
    schedule = {"_target_": "diffusion.schedules.Linear", "T": 4}
    module = {
        "_target_": "diffusion.modules.diffusion.ClassifierFreeDiffusion",
        "denoiser": {"_target_": "diffusion.denoiser.Denoiser", "network": network, "schedule": schedule},
        "sampler": {"_target_": "diffusion.samplers.DDIM", "steps": 2},
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True},
        "conditioner": {"_target_": "diffusion.conditioning.table.EmbeddingTable", "path": table},
    }
    return {"module": module, "working_directory": str(Path.cwd())}


def test_another_table_is_another_model():
    with pytest.raises(AntherError, match=r"conditioner\.path"):
        check_fits({"config": config("clip.csv")}, config("other.csv"), "last.ckpt")


def test_fid_of_other_reals_does_not_go_on(tmp_path):
    before, now = ({**config("x"), "callbacks": {"fid": {"split": split}}} for split in ("all", "train"))
    with pytest.raises(AntherError, match=r"callbacks\.fid\.split = all there and train here"):
        check_goes_on(before, now, tmp_path)
    check_goes_on(before, config("x"), tmp_path)
    check_goes_on(config("x"), now, tmp_path)


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
