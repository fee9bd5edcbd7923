"""Wrong input ends in one clear line on standard error and exit code 2; every other error keeps its traceback."""

import os
import sys
from collections.abc import Callable


class InputError(Exception):
    """What the user gave cannot work. The message is one line: the flag or file, what it got, what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; an `InputError` becomes `script.py: error: ...`, told by rank 0 alone, and exit 2."""
    try:
        main()
    except InputError as error:
        if os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")) == "0":
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
