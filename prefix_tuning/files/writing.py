"""Writes the files of a run: whole or not at all, with the same bytes for the same content, by one process at a time."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from prefix_tuning.errors import UserError

if sys.platform != "win32":
    import fcntl

_DRAFT = ".draft"  # suffix of the folder in which a file is written


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a path to write to. When the block ends without an error, that file replaces `path` in one step.

    So `path` is always the old file or the complete new one, even after a kill or a power cut. Raises UserError if the
    system refuses to write, for example because the disk is full.
    """
    # The draft has its own folder, because safetensors first writes to a temporary file beside it.
    folder = path.with_name(f".{path.name}{_DRAFT}")
    draft = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        yield draft
        # The folder's mode follows the umask. safetensors makes files that only their owner can read.
        draft.chmod(folder.stat().st_mode & 0o666)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        if os.name == "posix":  # Windows cannot open folders
            handle = os.open(path.parent, os.O_RDONLY)
            os.fsync(handle)  # else a power cut could undo the rename
            os.close(handle)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Removes the unfinished files that killed runs left in `folder`."""
    for draft in folder.glob(f".*{_DRAFT}"):
        shutil.rmtree(draft)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, from any device. The same content gives the same bytes, in any process.

    A safetensors file begins with N as 8 bytes, little-endian. N bytes of JSON follow, padded with spaces: {"__metadata__":
    {...}, NAME: {dtype, shape, data_offsets}, ...}. Then come the tensors, sorted by dtype and name. safetensors writes the
    metadata in the order of a hash table whose seed differs from process to process, so they are sorted here.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as draft:
        save_file(tensors, draft, {"format": "pt", **metadata})  # other programs expect this "format" in a file from torch
        with open(draft, "rb+") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder`, and locks it for the block against other processes that call this.

    The lock is an flock on the folder itself: the system releases it when the process ends, even by SIGKILL, and no lock
    file is left behind. Folders that did not exist before and are still empty at the end are removed, so that a run that
    fails early leaves nothing. Raises UserError if another process holds the lock, or if the folder cannot be made. If the
    file system has no locks, a warning goes to stderr. Windows has no flock, and nothing is locked there.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made: {error.strerror}; name another folder") from error
    handle = _flock(folder)
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # not empty
                path.rmdir()
        if handle is not None:
            os.close(handle)


def _flock(folder: Path) -> int | None:
    """The file descriptor that holds the lock until it is closed; None on Windows."""
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        hint = "wait until it ends, or name another folder"
        raise UserError(f"--output_dir {folder}: another run is writing to it; {hint}") from error
    except OSError as error:  # some network folders
        print(f"{folder}: cannot be locked ({error.strerror}): start no second run into it", file=sys.stderr)
    return handle
