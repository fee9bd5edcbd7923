"""Files and folders that are whole or not there, whenever a run is killed or the disk is full."""

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from align.errors import InputError

RENAME_EXCHANGE, AT_FDCWD = 2, -100  # linux/fs.h, fcntl.h


def flush(path: Path) -> None:
    """Returns once the file's content, or the folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- files


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """
    Gives a hidden path beside `path` to write a file to. When the block ends well, the file is flushed to disk and
    takes the place of `path`; when it fails, the file vanishes, and an `OSError` names `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # it is in its place, or the disk takes nothing any more
            partial.unlink(missing_ok=True)


def write_file(path: Path, text: str) -> None:
    """Writes a small file, which appears whole or not at all. Names that are not UTF-8 are written with backslashes."""
    with replace_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


# ---------------------------------------------------------------- folders


@contextmanager
def replace_folder(output: Path, flag: str) -> Iterator[Path]:
    """
    Gives a hidden folder beside `output` to fill. When the block ends well, it is flushed to disk and takes the place
    of `output` in one rename; when it fails, it vanishes. What a killed run has left is cleared at the next start.
    """
    partial = output.with_name(f".{output.name}.partial")
    if partial.is_symlink():
        raise InputError(
            f"{flag}: {partial}, where the model would be written first, is a link to elsewhere; remove it"
        )
    with HeldSignals() as signals:
        lock = _make_and_lock(partial, output, flag)
        try:
            with signals.let_in():
                _clear(partial)
                yield partial
                for path in [*partial.rglob("*"), partial]:
                    flush(path)
            put_in_place(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _make_and_lock(partial: Path, output: Path, flag: str) -> int:
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{flag}: cannot write beside {output} ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(
            f"{flag}: another run is writing {output} right now; wait for it, or name another folder"
        ) from None
    return lock


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        remove(entry)


def remove(path: Path) -> None:
    """Of a link to a folder elsewhere, the link alone."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


class HeldSignals:
    """Within the block, signals that would end it wait for `let_in`, or for its end: nothing is half done."""

    def __enter__(self) -> "HeldSignals":
        self.waiting, self.lets_in = 0, False
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
            self.handlers = {number: handler for number, handler in found.items() if callable(handler)}
        for number in self.handlers:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _: Any) -> None:
        self.waiting = self.waiting or number
        if self.lets_in:
            self._deliver()

    def _deliver(self) -> None:
        number, self.waiting = self.waiting, 0
        if number:
            self.handlers[number](number, None)

    @contextmanager
    def let_in(self) -> Iterator[None]:
        self.lets_in = True
        try:
            self._deliver()
            yield
        finally:
            self.lets_in = False

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self._deliver()


def put_in_place(folder: Path, final: Path) -> None:
    """Gives a flushed folder its final name in one step, and removes what had that name before."""
    if not final.exists():
        folder.rename(final)
        flush(final.parent)
        return
    replaced, previous = folder, _previous(final)
    try:
        swap_folders(folder, final)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        # NFS and the like cannot swap: a kill between these two renames leaves what `restore_folder` finds.
        shutil.rmtree(previous, ignore_errors=True)
        replaced = final.rename(previous)
        folder.rename(final)
    flush(final.parent)
    with suppress(OSError):
        remove(replaced)


def restore_folder(output: Path) -> None:
    """Puts the old `output` back where a kill came between the two renames of a file system that cannot swap."""
    if _previous(output).exists() and not output.exists():
        _previous(output).rename(output)


def _previous(output: Path) -> Path:
    return output.with_name(f".{output.name}.previous")


def swap_folders(first: Path, second: Path) -> None:
    """Exchanges two folders in one step, which neither os.rename nor os.replace can do."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(first))
