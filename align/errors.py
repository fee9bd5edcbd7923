"""Wrong input ends in one clear line on standard error and exit code 2; every other error keeps its traceback."""

import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """What the user gave cannot work. The message is one line: the flag or file, what it got, what to do."""


def check_seed(seed: int) -> None:
    """Refuses what numpy cannot be seeded with."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed: got {seed}; give 0 to {2**32 - 1}")


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; an `InputError` becomes `script.py: error: ...` and exit code 2.

    Every rank says so, as any of them may be the first to end; gaudi_spawn.py shows it once.
    """
    try:
        main()
    except InputError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
