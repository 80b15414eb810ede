"""From config nodes to objects, from our own packages and a few others only."""

from collections.abc import Iterator, Mapping
from typing import Any

from diffusion.errors import AntherError

# A config may come with a checkpoint from somebody else; what it names is called, so it may not name just anything.
ALLOWED = ("diffusion.", "datamodules.", "callbacks.", "lightning.", "torch.optim.")


def build(node: Mapping[str, Any], **extra: Any) -> Any:
    """Calls the `_target_` of a config node, inner nodes first.

    Args:
        node: a plain dict with `_target_`.
        **extra: further keywords, as they are.

    Raises:
        AntherError: a target outside the allowed packages, or one that does not take these keywords.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    for target in _targets(node):
        if not target.startswith(ALLOWED) or not _defined_in_allowed(target):
            raise AntherError(
                f"the config wants to call {target!r}, which lies outside {', '.join(ALLOWED)}: it is refused; use a "
                "part of these packages."
            )
    try:
        return instantiate(dict(node), **extra, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, AntherError):
                raise cause from None
            cause = cause.__cause__
        raise AntherError(f"cannot build {node.get('_target_')}: {' '.join(str(error).split())}") from error


def _defined_in_allowed(target: str) -> bool:
    """Whether what the name leads to lives there too: `diffusion.cli.os.system` does not."""
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception:  # Hydra says better than we what is wrong with a name that leads nowhere
        return True
    return f"{getattr(found, '__module__', '')}.".startswith(ALLOWED)


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _targets(value)
