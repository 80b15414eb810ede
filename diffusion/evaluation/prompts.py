"""What images are asked for: prompts from a list, a file or the classes, and the classes that they name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.conditioning.labels import find_class
from diffusion.errors import AntherError

# Not conf/prompts: Hydra would take `prompts=...` for the choice of a group of that name.
SHIPPED = Path(__file__).parents[2] / "conf" / "prompt_lists"


def read_prompts(
    prompts: Sequence[str] | str | None, classes: Sequence[str], captions: Mapping[str, str] | None = None
) -> list[str] | None:
    """The prompts that a setting means.

    Args:
        prompts: one of

            - a list of texts, taken as it is;
            - `classes`: one prompt per class of the model's data;
            - the path of a `.txt` file (one prompt per line; blank lines and lines that begin with # are left out) or
              of a `.yaml` file (a list, alone or under `prompts`);
            - the name of a shipped list, such as `three`;
            - None, for a model without a condition.
        classes: of the model's data.
        captions: what `classes` makes of a class, by its name; the name itself where there is none.

    Returns:
        At least one prompt, or None.

    Raises:
        AntherError: no prompt is left, one is no text, or there is no such file or name.
    """
    if prompts is None:
        return None
    if not isinstance(prompts, str):
        return _checked(prompts, "prompts")
    if prompts == "classes":
        if not classes:
            raise AntherError("prompts=classes needs classes and the model's data name none: list prompts instead.")
        return [(captions or {}).get(name, name) for name in classes]
    path = Path(prompts).expanduser()
    if path.suffix not in (".txt", ".yaml", ".yml"):
        path = SHIPPED / f"{prompts}.txt"
        if not path.is_file():
            raise AntherError(
                f"prompts={prompts!r} is no shipped list ({_shipped()}), not the word classes and no .txt or .yaml "
                f"file: for one prompt write prompts='[{prompts}]'."
            )
    return _checked(_read(path), str(path))


def labels_of(
    prompts: Sequence[str], class_names: Sequence[str], captions: Mapping[str, str] | None = None
) -> list[str | None]:
    """For each prompt the one class that it names, or None; see `find_class`.

    Args:
        prompts: any texts.
        class_names: names of classes.
        captions: by class; a prompt that is a caption word for word names its class, whatever its words are.
    """
    known = {caption: name for name, caption in (captions or {}).items()}
    return [known.get(prompt) or _label(prompt, class_names) for prompt in prompts]


def _label(prompt: str, class_names: Sequence[str]) -> str | None:
    try:
        return class_names[find_class(prompt, class_names)]
    except AntherError:
        return None


def _shipped() -> str:
    return ", ".join(sorted(path.stem for path in SHIPPED.glob("*.txt")))


def _read(path: Path) -> Any:
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            lines = [line.strip() for line in text.splitlines()]
            return [line for line in lines if line and not line.startswith("#")]
        content = yaml.safe_load(text)
    except OSError as error:
        raise AntherError(
            f"cannot read the prompts in {path} ({error.strerror}): correct the path, or take a shipped list "
            f"({_shipped()})."
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise AntherError(
            f"{path} cannot be read as UTF-8 {path.suffix[1:]}: correct it, or list the prompts in prompts=[...]."
        ) from error
    return content.get("prompts") if isinstance(content, Mapping) else content


def _checked(prompts: Any, where: str) -> list[str]:
    if not isinstance(prompts, Sequence) or isinstance(prompts, str):
        raise AntherError(f"{where} holds no list of prompts: write a list of texts, alone or under `prompts`.")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise AntherError(f"{where} holds {prompt!r}, which is no text: put quotes around it, or leave it out.")
    if not prompts:
        raise AntherError(f"{where} is an empty list of prompts: name at least one, as in prompts='[a red rose]'.")
    return list(prompts)
