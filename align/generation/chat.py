"""Talking to a model in the terminal, or to two at once: `run_generation.py --chat` and `--compare`."""

import gc
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import InputError
from align.generation.answers import OutputArguments, show_any_character
from align.generation.config import DecodingArguments, GaudiArguments
from align.generation.decoding import TerminalStreamer, TextGenerator
from align.generation.model import Flags, ModelArguments, Source, find_source
from align.generation.prompts import OWN_PROMPTS, Batch, PromptArguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

WIDTH = 64  # tokens: prompts are padded to a multiple, as every new shape is a graph that a Gaudi has to compile
HELP = "/new forgets the conversation, /bye or Ctrl-D ends it, Ctrl-C stops an answer."
BOLD, DIM, PLAIN = "\033[1m", "\033[2m", "\033[0m"
GO_WITH_CHAT = ("log_level", "use_chat_template")  # of the flags about prompts and output


@dataclass
class ChatArguments:
    _argument_group_name = "Chat"

    chat: bool = field(default=False, metadata={"help": "Talk to the model in the terminal; Ctrl-C stops an answer."})
    compare: str | None = field(
        default=None, metadata={"help": "With --chat: folder of a second model or adapter, which is asked the same."}
    )


def check_chat(
    chat: ChatArguments,
    prompts: PromptArguments,
    decoding: DecodingArguments,
    gaudi: GaudiArguments,
    output: OutputArguments,
    world_size: int,
) -> None:
    """Flags that have no effect in a conversation."""
    if chat.compare is not None and not chat.chat:
        raise InputError("--compare: a second model to talk to; add --chat")
    if not chat.chat:
        return
    if world_size > 1:
        raise InputError(f"--chat: the keyboard does not reach {world_size} ranks; talk to a model on one card")
    without = {
        each.name: getattr(arguments, each.name) != each.default
        for arguments in (prompts, output)
        for each in fields(arguments)
        if each.name not in GO_WITH_CHAT
    }
    without |= {
        "num_beams": decoding.num_beams > 1,
        "num_return_sequences": decoding.num_return_sequences > 1,
        "batch_size": gaudi.batch_size > 1,
        "bucket_size": gaudi.bucket_size > 0,
        "reuse_cache": gaudi.reuse_cache,
        "flash_attention_causal_mask": gaudi.flash_attention_causal_mask,
        "ignore_eos": bool(decoding.ignore_eos),
    }
    for flag, is_given in without.items():
        if is_given:
            raise InputError(f"--{flag}: has no effect in a conversation; leave it or --chat out")


class Stopped(Exception):
    """The user wants no more of this answer."""


class ChatStreamer(TerminalStreamer):
    """Shows an answer as it comes. Ctrl-C stops it between two tokens, so the model stays in order."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], end_tokens: list[int]):
        super().__init__(tokenizer, prompt_ids, end_tokens)
        self.is_stopped = False

    def stop(self, *_: object) -> None:
        self.is_stopped = True

    def put(self, ids: "torch.LongTensor") -> None:
        super().put(ids)
        if self.is_stopped:
            raise Stopped


@contextmanager
def stopped_by_interrupt(streamer: ChatStreamer) -> Iterator[None]:
    """Ctrl-C stops the answer instead of the program."""
    before = signal.signal(signal.SIGINT, streamer.stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def word_questions(messages: list[dict[str, str]]) -> str:
    """A conversation without a chat template: what sft.py and dpo.py make of the columns `question` and `answer`."""
    return "".join(
        f"Question: {each['content']}\n\nAnswer:" if each["role"] == "user" else f" {each['content']}\n\n"
        for each in messages
    )


def check_ids(name: str, ids: list[int], vocabulary_size: int) -> None:
    if max(ids) >= vocabulary_size:
        raise InputError(f"{name}: token {max(ids)} is beyond the model's vocabulary of {vocabulary_size}")


@dataclass
class Speaker:
    """A model with its side of the conversation; `room` is the longest prompt in tokens that leaves space to answer."""

    name: str
    generator: TextGenerator
    room: int
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.generator.tokenizer.chat_template:
            print(f"{self.name} has no chat template; it is asked as `Question: ...`, as after training on questions.")

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        from align.data.tokenization import encode_prompt

        tokenizer = self.generator.tokenizer
        try:
            ids = encode_prompt(tokenizer, messages if tokenizer.chat_template else word_questions(messages))
        except TemplateError as error:
            raise InputError(f"{self.name}: its chat template refuses the chat: {error}") from None
        check_ids(self.name, ids, self.generator.model.config.vocab_size)
        return ids

    def answer(self, question: str) -> None:
        """Asks with the conversation so far; where the model's context is too short, the oldest turns are left out."""
        messages = [*self.messages, {"role": "user", "content": question}]
        while len(ids := self.encode(messages)) > self.room and len(messages) > 1:
            del messages[:2]
        if len(ids) > self.room:
            print(f"That is {len(ids)} tokens; the model's context leaves room for {self.room}. Ask something shorter.")
            return
        if forgotten := (len(self.messages) - len(messages) + 1) // 2:
            print(dim(f"(the oldest {forgotten} of the turns no longer fit its context and are forgotten)"))
        width = min(-(-len(ids) // WIDTH) * WIDTH, self.room)
        streamer = ChatStreamer(self.generator.tokenizer, ids, self.generator.end_tokens)
        with stopped_by_interrupt(streamer):
            try:
                (new,), _ = self.generator.generate([ids], width, streamer)
                text = self.generator.text_of(ids, new)
                if not self.generator.is_stopped(ids, new):
                    print(dim(f"(cut at --max_new_tokens {self.generator.config.max_new_tokens})"))
            except Stopped:
                text = streamer.shown
                print(" " + dim("(stopped)"))
        self.messages = [*messages, {"role": "assistant", "content": text.strip()}]


def load_speaker(source: Source, decoding: DecodingArguments, gaudi: GaudiArguments) -> Speaker:
    from align.models.families import find_window  # transformers with it, once the command line is known to be right

    context = min(source.context, find_window(source.config) or sys.maxsize)
    room = context - decoding.max_new_tokens
    if room < 1:
        raise InputError(
            f"--max_new_tokens: {decoding.max_new_tokens} leave no room for a question in the model's context of "
            f"{context}"
        )
    from align.generation.probing import load_generator  # torch with it

    ids = source.tokenizer(OWN_PROMPTS[0]).input_ids[:room]
    check_ids(f"{source.flags.model}: {source.folder}", ids, source.vocabulary_size)
    generator = load_generator(source, decoding, gaudi, [ids], [Batch([0], min(WIDTH, room))], longest=room)
    return Speaker(str(source.adapter or source.folder), generator, room)


def find_any(arguments: ModelArguments, name: str, flag: str) -> Source:
    """A model folder, or an adapter on its own base."""
    is_adapter = (Path(name) / "adapter_config.json").exists()
    model, adapter = (None, name) if is_adapter else (name, None)
    return find_source(replace(arguments, model_name_or_path=model, peft_model=adapter), flags=Flags(flag, flag))


def load_speakers(
    chat: ChatArguments, model_args: ModelArguments, decoding: DecodingArguments, gaudi: GaudiArguments
) -> list[Speaker]:
    """The model and, with --compare, the second one."""
    name = model_args.model_name_or_path
    if name is None or model_args.peft_model is not None:
        sources = [find_source(model_args)]
    else:
        sources = [find_any(model_args, name, "--model_name_or_path")]
    if chat.compare is not None:
        compared = replace(model_args, tokenizer_name_or_path=None, model_revision=None)
        sources.append(find_any(compared, chat.compare, "--compare"))
    return [load_speaker(source, decoding, gaudi) for source in sources]


def chat(
    chat_args: ChatArguments, model_args: ModelArguments, decoding: DecodingArguments, gaudi: GaudiArguments
) -> None:
    speakers = load_speakers(chat_args, model_args, decoding, gaudi)
    gc.freeze()
    gc.enable()
    from optimum.habana.utils import set_seed  # quick only now

    set_seed(decoding.seed)
    talk(speakers)


def talk(speakers: list[Speaker]) -> None:
    """Asks every speaker what the user types, line by line, until the end of input."""
    show_any_character()
    if isinstance(sys.stdin, TextIOWrapper):  # what is no text is told, not the end
        sys.stdin.reconfigure(errors="surrogateescape")
    print(dim(HELP))
    while True:
        try:
            line = read_line()
            if line in ("/bye", "/exit", "/quit"):
                return
            if line == "/new":
                for speaker in speakers:
                    speaker.messages.clear()
                print(dim("(a new conversation)"))
            elif line.startswith("/"):
                print(dim(HELP))
            elif not is_text(line):
                print(f"That is not text in {sys.stdin.encoding}; nothing is asked.")
            elif line:
                for speaker in speakers:
                    if len(speakers) > 1:
                        print(bold(speaker.name))
                    speaker.answer(line)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n" + dim(HELP))


def read_line() -> str:
    """The next line of the user, without blanks around it; on a terminal with a prompt, and keys that edit it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        line = input("").removeprefix("\ufeff").strip()
        print(f">>> {line}")
        return line
    import readline  # input() uses it from here on; what is pasted is one question, however many lines it has

    readline.parse_and_bind("set enable-bracketed-paste on")
    return input(f"\1{BOLD}\2>>> \1{PLAIN}\2").strip()  # its width does not count


def is_text(line: str) -> bool:
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def bold(text: str) -> str:
    return f"{BOLD}{text}{PLAIN}" if sys.stdout.isatty() else text


def dim(text: str) -> str:
    return f"{DIM}{text}{PLAIN}" if sys.stdout.isatty() else text
