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
