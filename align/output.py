"""The folder that a run writes into: made, for this run alone, where there is room."""

import atexit
import errno
import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from align.errors import DISK_FULL, InputError

logger = logging.getLogger(__name__)

CACHES = "the variables HF_HOME and HF_DATASETS_CACHE"
LOCK = ".lock"
LEAST_FREE = 64 << 20  # bytes that a disk must have left for an adapter and what is written beside it
_locks: dict[Path, int] = {}  # held until the process ends


def prepare(output: Path) -> None:
    """Makes the folder, locks it and looks for room, before anything is loaded (rank 0)."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir: {output} cannot be made: {error.strerror}; name another folder") from error
    lock(output)
    free = shutil.disk_usage(output).free
    if free < LEAST_FREE:
        raise InputError(
            f"--output_dir: the disk of {output} has {free >> 20} MiB left; make room, or name a folder elsewhere"
        )


def check_writable(folder: Path, what: str) -> None:
    """Makes a folder that is written late in a run, and tries to write there; `what` begins the line of an error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{what}: {folder} cannot be written: {error.strerror}; name another folder") from error


@contextmanager
def naming_a_full(folder: Path, what: str) -> Iterator[None]:
    """Around writing into a folder; `what` begins the line of an error, which libraries raise without a name."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        reason = os.strerror(error.errno or 0)
        raise InputError(f"{what}: {folder} cannot be written: {reason}; make room, or name another folder") from error


def lock(output: Path, flag: str = "--output_dir") -> None:
    """Keeps other runs out of the folder while this process lives. A process that dies loses its lock."""
    path = output.resolve() / LOCK
    while path not in _locks:
        try:
            if path.exists() and not path.is_file():
                raise InputError(f"{flag}: {path} is no file, so it cannot be the lock of a run; remove it")
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            reason = f"{output} cannot be written: {error.strerror}"
            raise InputError(f"{flag}: {reason}; name another folder") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = os.read(held, 200).decode(errors="replace").strip()
            os.close(held)
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                logger.warning(f"the file system of {output} has no locks: a second run in it would not be noticed")
                return
            raise InputError(
                f"{flag}: another run writes into {output} ({who}); wait for its end, or name another folder"
            ) from error
        if not path.exists() or not os.path.samestat(os.fstat(held), path.stat()):
            os.close(held)  # a run that has just ended has removed it, so the next run would lock another file
            continue
        os.truncate(held, 0)
        with suppress(OSError):  # a full disk, which `prepare` reports
            os.write(held, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _locks[path] = held
        atexit.register(lambda: path.unlink(missing_ok=True))
