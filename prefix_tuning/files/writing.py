"""Who may write to a folder."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from prefix_tuning.errors import UserError

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


_DRAFT = ".draft"  # marks the folder of a file that is being written


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` when the block ends well: the file appears whole or not at all.

    Raises UserError where the system refuses, because the disk is full, say.
    """
    # A folder of its own, because safetensors, too, writes to a file of another name first.
    folder = path.with_name(f".{path.name}{_DRAFT}")
    draft = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        yield draft
        draft.chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files for their owner alone
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power cut. Windows cannot, and need not."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_drafts(folder: Path) -> None:
    """Removes what killed runs left half-written in `folder`."""
    for draft in folder.glob(f".*{_DRAFT}"):
        shutil.rmtree(draft)


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")
