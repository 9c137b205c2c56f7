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
    left. Folders that were made here and are still empty at the end are removed. Raises UserError if another process holds
    the lock, or if the folder cannot be made; warns on stderr where it has no locks. Windows has none of this kind.
    """
    made: list[Path] = []  # by this process, and not by another that starts at the same time
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                with suppress(FileExistsError):
                    place.mkdir()
                    made.insert(0, place)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made: {error.strerror}; name another folder") from error
    with _flock(folder):
        try:
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
