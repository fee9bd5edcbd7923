"""One way to speak to users: flags in, one clear line out."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from align.errors import InputError, ResultError, Stopped
from align.ranges import limit
from align.upstream_flags import translate

if TYPE_CHECKING:
    from transformers import HfArgumentParser

DEFAULTS = {"use_habana": True, "use_lazy_mode": True, "report_to": "none"}


def make_parser(dataclasses: Sequence[type], description: str, defaults: Mapping[str, Any]) -> "HfArgumentParser":
    """`defaults` replace those of the dataclasses where the script's recipe differs from optimum-habana's."""
    from transformers import HfArgumentParser  # gaudi_spawn.py and the merge do without this second

    class ArgumentParser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise InputError(message)

    parser = ArgumentParser(dataclasses, description=description, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS, **defaults)
    limit(parser)
    return parser


def parse_arguments(dataclasses: Sequence[type], description: str, defaults: Mapping[str, Any]) -> tuple:
    """One instance of each dataclass from the command line; an unknown flag is an error that suggests a known one."""
    parser = make_parser(dataclasses, description, defaults)
    arguments = translate(os.path.basename(sys.argv[0]), sys.argv[1:])
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except (ValueError, AssertionError) as error:  # rules across flags in optimum-habana's own arguments
        raise InputError(" ".join(str(error).split())) from error
    except OSError as error:  # optimum-habana looks for the Gaudi configuration here
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"a file that --gaudi_config_name or another flag names is not there: {reason}") from error
    if unknown:
        flag = unknown[0].partition("=")[0]
        close = get_close_matches(flag, parser._option_string_actions, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"unknown argument {unknown[0]!r}{hint} (--help lists them)")
    return tuple(parsed)


def start_logging(args) -> None:
    """Rank 0 tells what it does, in the log level that --log_level names (default: info); the others only warn."""
    import transformers

    level = args.get_process_log_level()
    transformers.utils.logging.set_verbosity(max(level, logging.WARNING) if args.log_level == "passive" else level)
    if not args.should_log:
        level = logging.ERROR
    elif args.log_level == "passive":
        level = logging.INFO
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger("align")
    root.handlers, root.propagate = [handler], False
    root.setLevel(level)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`. Exit codes: 2 for an `InputError`, 3 for a `ResultError`, 128 + signal when `Stopped`.

    Every rank says why, as any of them may be the first to end; gaudi_spawn.py shows it once.
    """
    try:
        main()
    except (InputError, ResultError, Stopped) as error:
        kind = "" if isinstance(error, Stopped) else "error: "
        print(f"{os.path.basename(sys.argv[0])}: {kind}{error}", file=sys.stderr)
        sys.exit({InputError: 2, ResultError: 3}.get(type(error)) or 128 + error.number)
