"""The exceptions that a user is meant to see."""


class AntherError(Exception):
    """A fault that the user can mend.

    Its message is one sentence: what is wrong, where, and what to do. The entry points print it without a trace and
    exit with status 1.
    """


def install(extras: str) -> str:
    """How to get the packages of an extra of pyproject.toml, for a sentence; Anther is on no index."""
    return f"run pip install -e '.[{extras}]' in the clone"


class Stopped(BaseException):
    """The run was asked to end by a signal, and everything up to here is on disk.

    It is no `Exception`, so it ends a sweep too and no handler of faults takes it for one. The entry points print one
    sentence and exit with status 128 + number, as a shell would report it.

    Args:
        number: of the signal.
        together: whether all processes of the run end at the same step.
    """

    def __init__(self, number: int, together: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.together = together
        self.again = ""  # how the run goes on, for the message
