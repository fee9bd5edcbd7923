"""Keeps back what libraries print, so that a user reads what the run says. --log_level debug shows it all.

Only light imports: this comes before all others.
"""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

from align.errors import InputError
from align.upstream_fixes import known_plugin


def wants_all() -> bool:
    """Whether the command line says --log_level debug: libraries are imported before it can be parsed."""
    return re.search(r"(^|\s)--log[_-]level[\s=]debug(\s|$)", " ".join(sys.argv[1:])) is not None


class _KeptBack(io.TextIOBase):
    """Keeps what is written to it. Later it is standard error, for loggers that were made meanwhile hold on to it."""

    def __init__(self):
        self.texts: list[str] = []
        self.is_over = False

    def write(self, text: str) -> int:
        if self.is_over:
            return sys.stderr.write(text)
        self.texts.append(text)
        return len(text)

    def flush(self) -> None:
        if self.is_over:
            sys.stderr.flush()


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hides what libraries print while they are imported.

    Where all is wanted, or the import fails, it goes to standard error; standard output is the script's own.
    """
    quiet_libraries()
    if wants_all():
        with known_plugin(), contextlib.redirect_stdout(sys.stderr):
            yield
        return
    kept = _KeptBack()
    try:
        with known_plugin(), contextlib.redirect_stdout(kept), contextlib.redirect_stderr(kept):
            yield
    except InputError:
        raise
    except KeyboardInterrupt:
        end_interrupted()
    except BaseException:
        sys.stderr.write("".join(kept.texts))
        raise
    finally:
        kept.is_over = True


def end_interrupted() -> NoReturn:
    """After Ctrl-C where nothing is to be saved."""
    print(f"{os.path.basename(sys.argv[0])}: SIGINT: stopped", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def quiet_libraries() -> None:
    """From here on DeepSpeed logs warnings alone, and warnings for developers are left out, unless all is wanted.

    DeepSpeed 0.16.9 logs every step of its start on standard output (utils/logging.py:45).
    """
    deepspeed = logging.getLogger("DeepSpeed")
    if _filter_deepspeed not in deepspeed.filters:  # its level is set anew when it is imported
        deepspeed.addFilter(_filter_deepspeed)
    if not wants_all() and not sys.warnoptions:
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)


def _filter_deepspeed(record: logging.LogRecord) -> bool:
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.stream = sys.stderr
    return wants_all() or record.levelno >= logging.WARNING
