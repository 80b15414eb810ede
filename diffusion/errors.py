"""The one exception that a user is meant to see."""


class AntherError(Exception):
    """A fault that the user can mend.

    Its message is one sentence: what is wrong, where, and what to do. The entry points print it without a trace and
    exit with status 1.
    """
