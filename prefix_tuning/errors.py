"""Errors that are no bugs: what the user can mend, and a signal that asked the run to stop."""


class UserError(Exception):
    """Something that the user can mend. Its message is one line that names the file, row or flag, and the way out."""


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved itself. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def reason_of(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
