"""The ways in which a run fails, each one clear line on standard error; align/cli.py gives the exit codes."""

import errno

# The disk is full, or cannot be written to at all.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class InputError(Exception):
    """What the user gave cannot work. The message is one line: the flag or file, what it got, what to do."""


class ResultError(Exception):
    """What the run has made cannot be trusted. The message is one line; the exit code is 3."""


class Stopped(Exception):
    """A signal has ended the run, which has saved before. The message is one line; the exit code is 128 + `number`."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


def one_line(error: BaseException) -> str:
    """The first line of another library's error, which may be a page long or empty; with the next one after a colon."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__
