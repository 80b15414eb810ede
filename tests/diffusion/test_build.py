import pytest

from diffusion.build import build
from diffusion.errors import AntherError
from diffusion.samplers import DDIM


def test_nodes_become_objects_inner_ones_first() -> None:
    node = {
        "_target_": "diffusion.schedules.ZeroTerminalSNR",
        "schedule": {"_target_": "diffusion.schedules.Cosine", "T": 7},
    }
    assert build(node).T == 7
    assert build({"_target_": "diffusion.samplers.DDIM"}, steps=3).steps == 3
    assert isinstance(build({"_target_": "diffusion.samplers.DDIM"}), DDIM)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "diffusion.samplers.DDIM", "steps": {"_target_": "builtins.eval"}},
        {"_target_": "diffusion.samplers.DDIM", "steps": [{"_target_": "subprocess.run"}]},
        {"_target_": "diffusionx.evil"},
        {"_target_": "diffusion.cli.os.system", "command": "true"},
    ],
)
def test_other_packages_are_refused_at_any_depth(node: dict[str, object]) -> None:
    with pytest.raises(AntherError, match="refused"):
        build(node)


def test_our_own_sentences_come_through_and_wrong_keywords_are_named() -> None:
    with pytest.raises(AntherError, match=r"^eta lies in"):
        build({"_target_": "diffusion.samplers.DDIM", "eta": 3})
    with pytest.raises(AntherError, match=r"cannot build diffusion.samplers.DDIM: .*'speed'"):
        build({"_target_": "diffusion.samplers.DDIM", "speed": 3})
