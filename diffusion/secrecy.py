"""Tokens and passwords: read from the environment or ~/.netrc, never from a config, and shown nowhere.

A config is written beside the run and into its checkpoints, and both get published.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusion.errors import AntherError

_NAME = re.compile(r"(^|[._-])(token|api_?key|password|passwd|secret)$", re.IGNORECASE)
_VARIABLE = re.compile(r"(TOKEN|API_?KEY|PASSWORD|SECRET|SECRET_ACCESS_KEY)$")
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_IN_QUERY = re.compile(
    r"(?<=[?&])((?:access_?|api_?|auth_?)?(?:token|key)|password|sig|signature|x-(?:amz|goog)-signature)=[^&\s'\"]+",
    re.IGNORECASE,
)
_SHORTEST = 8  # a shorter value of a variable may stand in any text


def check_words(words: Sequence[str]) -> None:
    """Refuses the words of a command line, before anything writes them down.

    Raises:
        AntherError: naming the word, not what it holds.
    """
    for word in words:
        key, _, value = word.partition("=")
        _check(key.lstrip("+~"), value)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses a resolved config, before it is stored in a checkpoint.

    Raises:
        AntherError: naming the setting, not what it holds.
    """
    for path, value in _leaves("", config):
        _check(path, value)


def hidden(text: str) -> str:
    """The text without the passwords of addresses and without the values of variables that hold a token."""
    text = _IN_QUERY.sub(r"\1=[hidden]", _IN_ADDRESS.sub("[hidden]", text))
    for value in _tokens().values():
        text = text.replace(value, "[hidden]")
    return text


def _check(path: str, value: Any) -> None:
    if isinstance(value, str) and value not in ("", "null") and _NAME.search(path):
        raise AntherError(
            f"{path} would be written into the config of the run and its checkpoints, so it is refused: tokens are "
            "read from the environment (HF_TOKEN, WANDB_API_KEY) or from where their own login command keeps them."
        )
    if not isinstance(value, str):
        return
    if _IN_ADDRESS.search(value):
        raise AntherError(
            f"{path} holds a password, which would be written into the config of the run and its checkpoints: leave it "
            "out of the address and write `machine HOST login NAME password PASSWORD` into ~/.netrc, which is read."
        )
    if (found := _IN_QUERY.search(value)) and "://" in value:
        raise AntherError(
            f"{path} holds an address with {found[1]}=…, which would be written into the config of the run and its "
            "checkpoints: download the file and give its path."
        )
    for name, token in _tokens().items():
        if token in value:
            raise AntherError(
                f"{path} holds the value of {name}, which would be written into the config of the run and its "
                "checkpoints: leave it out; who needs it reads the variable."
            )


def _tokens() -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if len(text) >= _SHORTEST and _VARIABLE.search(name)}


def _leaves(path: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), value)
    elif isinstance(node, list | tuple):
        for k, value in enumerate(node):
            yield from _leaves(f"{path}[{k}]", value)
    else:
        yield path, node
