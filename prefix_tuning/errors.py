"""The exceptions that are not bugs, which command.py turns into one line on stderr and an exit code."""


class UserError(Exception):
    """A mistake that the user can correct. Its message is one line that names the file, row or flag, and what to do."""


class Interrupted(Exception):
    """A run has stopped because of a signal, after it saved its state. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def reason_of(error: Exception) -> str:
    """The first line of a library's error message, or the name of its class where there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
