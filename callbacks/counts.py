"""The check that callbacks share."""

from diffusion.errors import AntherError


def check_counts(part: str, **counts: int) -> None:
    """Finds out before the first step that a setting which counts something counts nothing.

    Args:
        part: name of the callback in the config.
        **counts: its settings.

    Raises:
        AntherError: one is below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise AntherError(
                f"callbacks.{part}.{name} = {count}: give 1 or more, or leave the callback out with "
                f"callbacks.{part}=null."
            )
