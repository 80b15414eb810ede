"""What a config may name, and what is said about a setting that does not fit."""

import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion.build import build, construct, rebuild
from diffusion.errors import AntherError
from diffusion.evaluation.embeddings import Embedding
from diffusion.samplers import DDIM

ROOT = Path(__file__).parents[2]


def test_nodes_become_objects_inner_ones_first() -> None:
    node = {
        "_target_": "diffusion.schedules.ZeroTerminalSNR",
        "schedule": {"_target_": "diffusion.schedules.Cosine", "T": 7},
    }
    assert build(node).T == 7
    assert rebuild(node).T == 7
    assert build({"_target_": "diffusion.samplers.DDIM"}, "sampler", steps=3).steps == 3
    assert isinstance(build({"_target_": "diffusion.samplers.DDIM"}), DDIM)


def test_a_partial_takes_what_is_missing_later() -> None:
    make = build({"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.5})
    assert make([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 0.5


def test_settings_of_nothing_are_refused() -> None:
    for node in ({"steps": 5}, {}, 5):
        with pytest.raises(AntherError, match=r"^sampler has no _target_.* sampler=NAME"):
            build(node, "sampler")
    with pytest.raises(AntherError, match=r"^logger\.x has no _target_.* logger=NAME"):
        build({"path": "x"}, "logger.x")


HOSTILE = [
    {"_target_": "os.system", "command": "true"},
    {"_target_": "diffusion.samplers.DDIM", "steps": {"_target_": "builtins.eval"}},
    {"_target_": "diffusion.samplers.DDIM", "steps": [{"_target_": "subprocess.run"}]},
    {"_target_": "diffusion.samplers.DDIM", "steps": {"deeper": [[{"_target_": "subprocess.run"}]]}},
    {"_target_": "diffusionx.evil"},
    {"_target_": "diffusion.cli.os.system", "command": "true"},
    {"_target_": "diffusion.assets.subprocess.run", "args": ["true"]},
    {"_target_": "diffusion.assets.subprocess.Popen", "args": ["true"]},
    {"_target_": "lightning.fabric.utilities.cloud_io.fsspec.open", "urlpath": "x"},
    {"_target_": "lightning.pytorch.cli.LightningCLI", "args": ["fit"]},
    {"_target_": "callbacks.samples.Path", "args": "x"},
    {"_target_": "callbacks.samples.Path.unlink"},
    {"_target_": "diffusion.files.atomic", "path": "x"},
    {"_target_": "diffusion.curation.publish.publish", "folder": ".", "repo_id": "me/x", "dry_run": False},
    {"_target_": "diffusion.curation.publish._Sender", "repo_id": "me/x", "endpoint": "http://127.0.0.1"},
    {"_target_": "diffusion.modules.contrastive.export_clip"},
    {"_target_": "diffusion.assets.download", "url": "http://127.0.0.1", "path": "x"},
    {"_target_": "diffusion.build.build"},
    {"_target_": "hydra.utils.call", "_args_": ["os.system"]},
    {"_target_": "hydra.utils.get_class", "path": "os.system"},
    {"_target_": "torch.load", "f": "x"},
    {"_target_": "torch.optim.optimizer.torch.load", "f": "x"},
    {"_target_": "diffusion.samplers.DDIM", "_args_": [3]},
    {"_target_": "diffusion.samplers.DDIM", "_recursive_": False},
    {"_target_": "diffusion.samplers.DDIM", "_convert_": "object"},
    {"_target_": "${oc.decode:os.system}"},
    {"_target_": ["os.system"]},
    {"_target_": "diffusion"},
    {"_target_": ""},
]


@pytest.mark.parametrize("make", [build, rebuild])
@pytest.mark.parametrize("node", HOSTILE, ids=lambda node: str(node)[:60])
def test_what_is_no_part_is_refused_at_any_depth(node, make, monkeypatch) -> None:
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it was called"))
    with pytest.raises(AntherError, match="refused"):
        make(node, "module")


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "diffusion.loggers.CSVLog", "path": "x"},
        {"_target_": "diffusion.loggers.wandb_logger", "project": "x", "save_dir": "x"},
        {"_target_": "callbacks.samples.SampleGrid", "dirpath": "x"},
        {"_target_": "lightning.Trainer"},
        {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "save_dir": "x"},
        {"_target_": "diffusion.evaluation.scoring.Scores"},
    ],
    ids=lambda node: node["_target_"],
)
def test_a_checkpoint_names_parts_of_models_alone(node) -> None:
    with pytest.raises(AntherError, match="refused"):
        rebuild(node)
    if "CSVLog" in node["_target_"]:
        assert build(node).path == Path("x")


def test_texts_of_a_checkpoint_are_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's own instantiate reads the variable and, by oc.create, makes a node that no check has seen."""
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    labels = rebuild({"_target_": "diffusion.conditioning.labels.Labels", "class_names": ["${oc.env:HF_TOKEN}", "b"]})
    assert labels.class_names == ("${oc.env:HF_TOKEN}", "b")
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it was called"))
    with pytest.raises(AntherError, match="does not fit"):
        rebuild({"_target_": "diffusion.samplers.DDIM", "steps": "${oc.create:{_target_: os.system, command: 'true'}}"})


def test_every_part_of_the_shipped_configs_may_be_named() -> None:
    """Of every experiment, and the model and data of each from a checkpoint, too."""
    from diffusion.build import FUNCTIONS, FUNCTIONS_OF_MODELS, PARTS, PARTS_OF_MODELS, _resolve

    def targets(node):
        if isinstance(node, dict):
            yield from [node["_target_"]] if "_target_" in node else []
            node = list(node.values())
        for inner in node if isinstance(node, list) else ():
            yield from targets(inner)

    for path in (ROOT / "conf").rglob("*.yaml"):
        if path.parent.name != "hydra":
            for target in targets(OmegaConf.to_container(OmegaConf.load(path))):
                assert callable(_resolve(target, "", PARTS, FUNCTIONS))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for experiment in (ROOT / "conf" / "experiment").glob("*.yaml"):
            config = compose("train", [f"experiment={experiment.stem}"])
            for key in ("module", "data"):
                for target in targets(OmegaConf.to_container(config[key], resolve=True)):
                    assert callable(_resolve(target, "", PARTS_OF_MODELS, FUNCTIONS_OF_MODELS))


def test_our_own_sentences_come_through_and_wrong_keywords_are_named() -> None:
    with pytest.raises(AntherError, match=r"^eta lies in"):
        build({"_target_": "diffusion.samplers.DDIM", "eta": 3}, "sampler")
    with pytest.raises(AntherError, match=r"^sampler has no setting 'stepss' \(did you mean steps\?\)"):
        build({"_target_": "diffusion.samplers.DDIM", "stepss": 3}, "sampler")
    with pytest.raises(AntherError, match=r"^sampler.steps = 'few' does not fit: give a whole number or null"):
        build({"_target_": "diffusion.samplers.DDIM", "steps": "few"}, "sampler")
    with pytest.raises(AntherError, match=r"^schedule lacks schedule, which"):
        build({"_target_": "diffusion.schedules.ZeroTerminalSNR"}, "schedule")


def test_settings_that_a_class_hands_on_are_checked_too() -> None:
    node = {"_target_": "datamodules.mnist_idk.MNISTWithIDK", "seed": 0, "batch_size": 4}
    build(node, "data")
    with pytest.raises(AntherError, match=r"^data.batch_size = 'many'"):
        build({**node, "batch_size": "many"}, "data")
    with pytest.raises(AntherError, match="has no setting 'colour'"):
        build({**node, "colour": "red"}, "data")


def test_a_fault_of_a_library_names_the_group_that_the_user_set() -> None:
    optimizer = {"_target_": "torch.optim.Adam", "_partial_": True, "lr": -1.0}
    inner = {"_target_": "diffusion.modules.classification.Classification", "optimizer": optimizer}
    inner["network"] = {"_target_": "diffusion.networks.classifier.LeNet", "classes": 10, "digits": 10}
    module = build(inner, "module")
    with pytest.raises(AntherError, match=r"^cannot build optimizer \(torch.optim.adam.Adam\): Invalid learning rate"):
        module.configure_optimizers()


def test_a_dataclass_may_be_made_of_settings() -> None:
    assert construct(Embedding, {"layer": "down1", "steps": []}, "embedding").layer == "down1"
    with pytest.raises(AntherError, match=r"embedding.form = 'round' does not fit: give one of pooled, flat, raw"):
        construct(Embedding, {"form": "round"}, "embedding")
    with pytest.raises(AntherError, match=r"embedding = 'down2' does not fit"):
        construct(Embedding, "down2", "embedding")
