"""Who may write to a folder."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prefix_tuning.config import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder`, and keeps other processes that ask for the same lock out of it until the block ends.

    The lock is flock's, on the folder itself: the system releases it when the process ends, even by SIGKILL, and no file is
    left. A folder that was made here and is still empty at the end is removed. Raises UserError if another process holds the
    lock, or if the folder cannot be made; warns on stderr where the folder has no locks. Windows has none of this kind.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made: {error.strerror}; name another folder") from error
    try:
        with _flock(folder):
            yield
    finally:
        for place in made:
            with suppress(OSError):  # not empty
                place.rmdir()


@contextmanager
def _flock(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        hint = "wait until it ends, or name another folder"
        raise UserError(f"--output_dir {folder}: another run is writing to it; {hint}") from error
    except OSError as error:  # some network folders
        print(f"{folder}: cannot be locked ({error.strerror}): start no second run into it", file=sys.stderr)
    try:
        yield
    finally:
        os.close(handle)
