"""One way to speak to users: flags in, one clear line out."""

import argparse
import errno
import json
import logging
import math
import os
import re
import select
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

from align import __version__
from align.errors import DISK_FULL, InputError, ResultError, Stopped
from align.quiet import end_interrupted, quiet_imports, quiet_libraries
from align.ranges import limit, shorten
from align.upstream_flags import FALSE, TRUE, name_as_given, split_flags, translate

if TYPE_CHECKING:
    from argparse import ArgumentParser as _Parser

    from transformers import HfArgumentParser
else:
    _Parser = object  # what the mixin stands in front of

DEFAULTS = {"use_habana": True, "report_to": "none"}
OF_LAZY_MODE = ("use_lazy_mode", "use_hpu_graphs", "use_hpu_graphs_for_training", "use_hpu_graphs_for_inference")
COMPILING = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
OBJECTS = ("gradient_checkpointing_kwargs", "lr_scheduler_kwargs")
OBJECTS_OR_FILES = ("accelerator_config", "deepspeed", "fsdp_config")
SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "optimizer.params", "scheduler.params")  # of DeepSpeed's
MEANT = {  # by words in errors that name neither a flag nor what it was given
    "DeepSpeed config": "deepspeed",
    "load the configuration of": "gaudi_config_name",
    "couldn't connect to": "gaudi_config_name",
    "not a local folder": "gaudi_config_name",
    "GaudiConfig() argument after **": "gaudi_config_name",
    "Token is required": "push_to_hub_model_id",
    "TPUs are not supported": "tpu_num_cores",
}
TOKEN = re.compile(r"\bhf_\w{10,}")  # as one stands behind a flag that was misspelt
REST = "Others"  # the group of flags that --help leaves to --help_all


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a flag, what it takes, what it means and its default, in one line where they fit."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=max(100, shutil.get_terminal_size((140, 24)).columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return str(action.metavar or action.dest)
        kinds: dict[Any, str] = {int: "N", float: "X"}
        reads: Any = getattr(action.type, "reads", action.type)
        takes = "" if action.nargs in (0, "?") else kinds.get(reads, "TEXT")
        return f"{action.option_strings[0]} {action.metavar or takes}".strip()

    def _expand_help(self, action: argparse.Action) -> str:
        text, default = " ".join((action.help or "").split()), action.default
        choices = [str(choice) for choice in action.choices or ()]
        if 0 < len(choices) <= 8:
            says, begin, own_default = text.partition(" (default")
            text = f"{says.rstrip('.')}. One of {', '.join(choices)}." + begin + own_default
        says_nothing = default in (None, "", argparse.SUPPRESS) or default is False or default == []
        if says_nothing or "default" in text or action.nargs == 0:
            return text
        return f"{text} (default: {getattr(default, 'value', default)})"


class ParserMixin(_Parser):
    """What the parsers of all scripts share: errors of one line, both spellings of a flag, --version, --help_all."""

    shows_all = False
    groups: Mapping[str, Mapping[str, str]] = {}  # of flags whose own help is not ours: by group, what they mean

    def __init__(self, description: str, **options: Any):
        options = {"allow_abbrev": False, "formatter_class": HelpFormatter, "add_help": False, **options}
        super().__init__(description=description, **options)
        about = self.add_argument_group("Help")
        about.add_argument("--help", "-h", action="help", help="show this and stop")
        version = f"{self.prog} {__version__}"
        about.add_argument("--version", action="version", version=version, help="show the version and stop")

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"(--\w+)(/--[\w-]+)+", r"\1", message)  # either spelling
        message = re.sub(r"^argument (--\w+): ", r"\1: ", message)
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        raise InputError(f"{f'{missing[1]}: missing' if missing else message} (--help lists the flags)")

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """An unknown flag is an error that suggests a known one."""
        if unknown:
            flag = unknown[0].partition("=")[0].replace("-", "_").replace("__", "--", 1)
            close = get_close_matches(flag, [name for name in self._option_string_actions if "-" not in name[2:]], 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise InputError(f"unknown argument {unknown[0]!r}{hint} (--help lists them)")

    def add_opposites(self) -> None:
        """`--no_x` for each switch `--x`; --help leaves them out."""
        for action in list(self._actions):
            name = f"--no_{action.dest}"
            is_switch = action.const is True and not action.dest.startswith("no_")
            if is_switch and name not in self._option_string_actions:
                self.add_argument(
                    *_spellings([name]), action="store_false", dest=action.dest, default=argparse.SUPPRESS
                )

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(f"usage: {self.usage or f'{self.prog} [flags]'}")
        formatter.add_text(self.description)
        for title, actions in self._find_sections().items():
            formatter.start_section(title)
            formatter.add_arguments([action for action in actions if action.help != argparse.SUPPRESS])
            formatter.end_section()
        return formatter.format_help()

    def _find_sections(self) -> dict[str, list[argparse.Action]]:
        """Actions by the title of their group. Of a library's flags only those in `groups`, unless all are shown."""
        names = {name: title for title, flags in self.groups.items() for name in flags}
        rare = self.groups.get(REST, {})
        sections: dict[str, list[argparse.Action]] = {}
        about = next(group for group in self._action_groups if group.title == "Help")
        for group in [each for each in self._action_groups if each is not about]:
            for action in group._group_actions:
                is_ours = not self.groups or group.title not in ("options", "optional arguments")
                if not action.option_strings:
                    continue  # the usage shows it
                title = (
                    (group.title or "Flags") if is_ours and action.dest not in rare else names.get(action.dest, REST)
                )
                if action.dest in names and not is_ours:
                    action.help = self.groups[title][action.dest]
                if action.option_strings[:1] == [f"--no_{action.dest}"] or (title == REST and not self.shows_all):
                    continue
                sections.setdefault("Flags" if title == "options" else title, []).append(action)
        order = [title for title in ("Model", "LoRA", "Data", *self.groups) if title in sections and title != REST]
        order += [title for title in sections if title not in order and title != REST]
        rest = {REST: sections[REST]} if REST in sections else {}
        return {**{title: sections[title] for title in order}, **rest, "Help": about._group_actions}


class Parser(ParserMixin, argparse.ArgumentParser):
    """For scripts that do without transformers' import time."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        return super().add_argument(*_spellings(names), **options)

    def add_argument_group(self, *args: Any, **options: Any) -> argparse._ArgumentGroup:
        group: Any = super().add_argument_group(*args, **options)
        add = group.add_argument
        group.add_argument = lambda *names, **more: add(*_spellings(names), **more)
        return group

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        self.add_opposites()
        words = list(sys.argv[1:] if argv is None else argv)
        takes_script = any(not action.option_strings for action in self._actions)
        if not takes_script:  # whose arguments are its own
            check_text(words)
        values, unknown = self.parse_known_args(self._close_switches(words) if takes_script else words)
        self.refuse_unknown(unknown)
        return values

    def _close_switches(self, words: list[str]) -> list[str]:
        """`--x script.py` as `--x=True script.py`: else a switch would take the script for its value."""
        words, closed = list(words), []
        while words and words[0].startswith("-"):
            action = self._option_string_actions.get(word := words.pop(0))
            if action is not None and action.nargs == "?":
                is_given = words and words[0].lower() in TRUE + FALSE
                word = f"{word}={words.pop(0) if is_given else action.const}"
            closed.append(word)
            if action is not None and action.nargs is None:
                closed += words[:1]
                del words[:1]
        return closed + words


def _spellings(names: Sequence[str]) -> list[str]:
    dashed = [f"--{name[2:].replace('_', '-')}" for name in names if name.startswith("--")]
    return list(dict.fromkeys([*names, *dashed]))


def with_underscores(words: Sequence[str]) -> list[str]:
    """Flags of a command line as the parsers store them: users may write dashes too."""
    parts = [(word.partition("=") if word.startswith("--") else ("", "", word)) for word in words]
    return [f"{flag[:2]}{flag[2:].replace('-', '_')}{equals}{value}" for flag, equals, value in parts]


def given_flags() -> set[str]:
    """Names of the flags on the command line; `--no_x` is a name of `--x`."""
    names = {word[2:].partition("=")[0] for word in with_underscores(sys.argv[1:]) if word.startswith("--")}
    return names | {name.removeprefix("no_") for name in names}


def given_value(name: str) -> str | None:
    """The value that the command line gives this flag, before any library has changed it; None where it gives none."""
    given = [(flag, values) for flag, values, _ in split_flags(with_underscores(sys.argv[1:]))]
    values = [["False"] if flag == f"no_{name}" else values for flag, values in given if flag in (name, f"no_{name}")]
    return values[-1][0] if values and values[-1] else None


def read_boolean(text: str) -> bool:
    """The words that the flags of transformers take."""
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"got {text!r}; give True or False")
    return text.lower() in TRUE


# Of a flag that has no value, or one of these words
SWITCH: Mapping[str, Any] = {"type": read_boolean, "nargs": "?", "const": True, "default": False}


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def make_parser(
    dataclasses: Sequence[type],
    description: str,
    defaults: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, str]] | None = None,
) -> "HfArgumentParser":
    """`defaults` replace those of the dataclasses where the script's recipe differs from optimum-habana's.

    `groups` describe the flags of a library's dataclass that --help shows; --help_all shows all.
    """
    from transformers import HfArgumentParser  # gaudi_spawn.py and the merge do without this second
    from transformers.hf_argparser import string_to_bool

    class DataclassParser(ParserMixin, HfArgumentParser):
        pass

    DataclassParser.groups = groups or {}
    parser = DataclassParser(dataclass_types=dataclasses, description=description)
    if groups:
        about = next(group for group in parser._action_groups if group.title == "Help")
        about.add_argument(
            *("--help_all", "--help-all"),
            action=_HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="show all flags and stop",
        )
    for action in parser._actions:
        if action.type is string_to_bool:
            action.type, action.nargs, action.const = read_boolean, "?", True  # those of three values say True too
    known = {action.dest for action in parser._actions}
    ours = DEFAULTS | {"use_lazy_mode": not is_eager()}
    parser.set_defaults(**{name: value for name, value in ours.items() if name in known}, **defaults)
    parser.add_opposites()
    limit(parser)
    return parser


def parse_arguments(
    dataclasses: Sequence[type],
    description: str,
    defaults: Mapping[str, Any] | None = None,
    groups: Mapping[str, Mapping[str, str]] | None = None,
    argv: Sequence[str] | None = None,
    script: str | None = None,
) -> tuple:
    """One instance of each dataclass from the command line; an unknown flag is an error that suggests a known one.

    Flags of upstream's example of the same name as `script` are understood too.
    """
    parser = make_parser(dataclasses, description, defaults or {}, groups)
    check_text(sys.argv[1:] if argv is None else argv)
    arguments = translate(script or os.path.basename(sys.argv[0]), list(sys.argv[1:] if argv is None else argv))
    flags, _ = parser.parse_known_args(arguments)  # shows --help, which is no chatter
    check_mode(flags)
    check_objects(flags)
    with quiet_imports():  # optimum-habana's arguments import its models
        try:
            *parsed, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        except (ValueError, AssertionError, OSError, TypeError) as error:  # rules across flags, files that they name
            blamed = blame(error, arguments, dataclasses)
            if blamed is None and isinstance(error, TypeError):
                raise
            reason = " ".join(str(error).split())
            raise InputError(blamed or reason) from error
    parser.refuse_unknown(unknown)
    return tuple(parsed)


def check_text(words: Sequence[str]) -> None:
    """Bytes that are no text would fail later: tokenizers, data sets and the pages of a run do not take them."""
    for name, values, _ in split_flags(list(words)):
        for value in (name, *values):
            if any("\udc80" <= character <= "\udcff" for character in value):
                shown = shorten(value.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
                raise InputError(f"--{name}: got {shown}, which is not UTF-8; give it as text, or another name")


def check_objects(flags: argparse.Namespace) -> None:
    """Flags that take JSON, or a file of it, before transformers reads it."""
    for name in OBJECTS + OBJECTS_OR_FILES:
        text, file = getattr(flags, name, None), "" if name in OBJECTS else " or a file of one"
        if not isinstance(text, str) or (name == "deepspeed" and not text):  # said to be empty later
            continue
        try:
            is_file = file and not text.startswith("{")
            read = Path(text).read_text(encoding="utf-8") if is_file else text
            found = json.loads(read, parse_float=_read_number, parse_constant=_read_number)
        except OSError as error:
            raise InputError(f"--{name}: got {shorten(text)}; {error.strerror}") from None
        except OverflowError as error:
            raise InputError(f"--{name}: got {shorten(text)}; {error}") from None
        except (ValueError, RecursionError):
            found = None
        for section in SECTIONS if name == "deepspeed" and isinstance(found, dict) else ():
            inner = found
            for key in section.split("."):
                inner = inner.get(key, {})
                if not isinstance(inner, dict):
                    raise InputError(f"--{name}: got {shorten(text)}; {section} there is no object of JSON")
        if not isinstance(found, dict):
            raise InputError(f"--{name}: got {shorten(text)}; give an object of JSON, as '{{\"name\": 1}}'{file}")


def _read_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise OverflowError(f"{text} is no number that can be computed with")
    return number


def blame(error: Exception, arguments: Sequence[str], dataclasses: Sequence[type]) -> str | None:
    """What a library says of its arguments, with the flag of this command line that it means; None where none is sure.

    A value may be that of several flags: where a library names a type, the flag is of that type.
    """
    message = " ".join(str(error).split())
    given = {name.replace("-", "_"): values for name, values, _ in split_flags(list(arguments)) if name}
    for words, name in MEANT.items():
        if words in message and name in given:
            return f"--{name}: got {shorten(' '.join(given[name])) or repr('')}; {message}"
    for name in [name for name in given if "_" in name]:
        message = re.sub(rf"`?(?<!-)\b{name}\b`?", f"--{name}", message)
    if any(re.search(rf"--{name}\b", message) for name in given):
        return message
    pairs = [(name, value) for name, values in given.items() for value in values]
    if choice := re.fullmatch(r"(.*?) ?is not a valid (\w+), please select one of (.*)", message):
        kinds = {name: str(kind) for each in dataclasses for name, kind in get_type_hints(each).items()}
        meant = [
            (name, value)
            for name, value in pairs
            if re.search(rf"\b{choice[2]}\b", kinds.get(name, "")) and choice[1] in (value, *value.split())
        ]
        message = "choose from " + ", ".join(re.findall(r"'([^']+)'", choice[3]))
    else:
        meant = [(name, value) for name, value in pairs if _is_quoted(value, message)]
        if len({name for name, _ in meant}) > 1:
            return None
    if not meant:
        return None
    name, value = meant[0]
    return f"--{name}: got {shorten(value) or repr(value)}; {message}"


def _is_quoted(value: str, message: str) -> bool:
    """Whether a message quotes this value, or a key of its JSON, as a whole."""
    words = "|".join(re.escape(word) for word in [value, *re.findall(r'"(\w+)"\s*:', value)] if word)
    return bool(words) and bool(re.search(rf"(['\"`])({words})\1|Received: ({words})$", message))


def is_eager() -> bool:
    """Whether the plugin runs each operation at once: the variable that it reads when torch loads it."""
    return os.environ.get("PT_HPU_LAZY_MODE") == "0"


def check_mode(flags: argparse.Namespace) -> None:
    """Refuses flags that need the other mode: in eager mode the plugin has no HPU graphs."""
    for name in COMPILING:
        if not is_eager() and getattr(flags, name, False):
            raise InputError(f"--{name}: needs eager mode; set the variable PT_HPU_LAZY_MODE=0 before the command")
    for name in OF_LAZY_MODE:
        if is_eager() and getattr(flags, name, False):
            raise InputError(f"--{name}: the variable PT_HPU_LAZY_MODE=0 asks for eager mode; leave one of them out")


def start_logging(args) -> None:
    """Rank 0 logs at the level that --log_level names (default: info); the other ranks log errors alone."""
    import transformers

    quiet_libraries()
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


def open_closed_streams() -> None:
    """Opens what a shell has closed (`>&-`): the next file would take its place, and get what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, descriptor == number)
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r"))


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`. Exit codes: 2 for an `InputError`, 3 for a `ResultError`, 128 + signal when `Stopped`.

    Every rank says why it fails, as any of them may be the first; gaudi_spawn.py shows it once. They stop together.
    """
    open_closed_streams()
    try:
        main()
        _leave_ranks()
    except (InputError, ResultError) as error:
        script = os.path.basename(sys.argv[0])
        message = TOKEN.sub("hf_...", name_as_given(script, sys.argv[1:], str(error)))
        print(f"{script}: error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 3)
    except Stopped as stopped:
        ranks = _find_ranks()
        if ranks is None or ranks.get_rank() == 0:
            print(f"{os.path.basename(sys.argv[0])}: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        end_interrupted()
    except BrokenPipeError:
        if not lost_reader():  # then it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes out the rest as it ends
        print(f"{os.path.basename(sys.argv[0])}: nobody reads standard output any more: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EIO):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{os.path.basename(sys.argv[0])}: error: {where}{error.strerror}", file=sys.stderr)
        sys.exit(3)


def lost_reader() -> bool:
    """Whether standard output is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(1, 0)
    return any(happened & select.POLLERR for _, happened in poll.poll(0))


def _leave_ranks() -> None:
    """Closes the connections to other ranks: their threads may abort a process as it ends ("terminate called")."""
    if ranks := _find_ranks():
        ranks.destroy_process_group()


def _find_ranks() -> Any:
    """The module torch.distributed where this process is one of several ranks, else None."""
    distributed = sys.modules.get("torch.distributed")
    is_rank = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if is_rank else None
