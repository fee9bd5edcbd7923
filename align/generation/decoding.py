"""Token ids in, token ids out: greedy, sampled or by beams, with end tokens, streaming and timing.

The loop is our own, around the forward passes of optimum-habana's classes: its `generate` (1.21.2) runs the first pass
over the room for the answer too, records a graph for every step of a beam search, and hands padding to the processors
of a generation config. Heavy packages are imported where they are used: imports are most of the time to the first word.
"""

import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.generation.beams import BeamOptions, Beams
from align.generation.processors import Processor, make_processors
from align.generation.prompts import pad_batch
from align.generation.stepping import ForwardOptions, GrowingShapes, StaticShapes, Texts, make_stepper

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

SHORTEST = 4  # columns of a prompt: a reused cache takes one for a decoding step
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and ends of lines
STEPS_PER_CHECK = 8  # steps between two looks for end tokens: each look waits for the device


@dataclass(frozen=True)
class Timing:
    """Of one batch: seconds to its first tokens (None with beams) and its end, tokens of prompts and answers, steps."""

    first_token: float | None
    total: float
    prompt_tokens: int
    new_tokens: int
    steps: int


class TerminalStreamer:
    """Shows one text as it appears, by whole characters."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], end_tokens: list[int]):
        self.tokenizer = tokenizer
        self.prompt_ids = prompt_ids
        self.end_tokens = end_tokens
        self.new_ids: list[int] = []
        self.shown = ""

    def put(self, ids: "torch.LongTensor") -> None:
        self.new_ids += [token for token in ids.tolist() if token not in self.end_tokens]
        text = decode_new(self.tokenizer, self.prompt_ids, self.new_ids)
        if not text.endswith("\ufffd"):
            print(as_shown(text[len(self.shown) :]), end="", flush=True)
            self.shown = text

    def end(self) -> None:
        print(as_shown(decode_new(self.tokenizer, self.prompt_ids, self.new_ids or [])[len(self.shown) :]))


def as_shown(text: str) -> str:
    """What a model says. A terminal would obey the control characters in it, and so gets their numbers."""
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text) if sys.stdout.isatty() else text


def decode_new(tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], new_ids: list[int]) -> str:
    """The text that `new_ids` add to the prompt; decoded alone, many tokenizers would lose a leading blank."""
    prompt, whole = tokenizer.batch_decode(
        [prompt_ids, prompt_ids + new_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return whole[len(prompt) :]


@dataclass
class TextGenerator:
    """A model on its card, with its tokenizer and how to decode; a batch has `rows` prompts, none wider than `longest`.

    `config` says what to choose, `options` how to compute it; `end_tokens` end a text.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    config: "GenerationConfig"
    options: ForwardOptions
    end_tokens: list[int]
    rows: int
    longest: int = 0
    stepper: StaticShapes | GrowingShapes = field(init=False)
    processors: list[Processor] = field(init=False)
    invalid: Any = field(init=False, default=None)  # on the device: whether logits since the prompts have been NaN

    def __post_init__(self) -> None:
        self.stepper = make_stepper(self.model, self.options)
        self.processors = make_processors(self.config, self.end_tokens)

    @property
    def answers_per_prompt(self) -> int:
        return self.config.num_return_sequences

    @property
    def copies(self) -> int:
        """Rows of each prompt: its beams, or its answers."""
        return self.config.num_beams if self.config.num_beams > 1 else self.answers_per_prompt

    def generate(
        self, encoded: list[list[int]], width: int, streamer: TerminalStreamer | None = None
    ) -> tuple[list[list[int]], Timing]:
        """New tokens of each prompt, up to and with its first end token, and how long they took.

        There are `answers_per_prompt` of each, one after the other.
        """
        import torch

        start = time.perf_counter()
        texts = self.lay_out(encoded, width)
        first: list[float] = []

        def check() -> bool:
            first[:] = first or [time.perf_counter()]
            return self._all_ended(texts, encoded)

        with torch.inference_mode():
            if self.config.num_beams > 1:
                output = self._search_beams(texts, encoded)
            else:
                output = self._choose_tokens(texts, streamer, check)
        each = self.answers_per_prompt
        rows = output.tolist()[: len(encoded) * each]
        end = time.perf_counter()
        new = [self._cut(encoded[row // each], tokens) for row, tokens in enumerate(rows)]
        lengths = list(map(len, new))
        first_token = first[0] - start if first else None
        return new, Timing(first_token, end - start, sum(map(len, encoded)), sum(lengths), max(lengths))

    def lay_out(self, encoded: list[list[int]], width: int) -> Texts:
        """The prompts on the device, padded to `width`, with columns for what will follow."""
        from align.models.families import IGNORE_PADDING

        keeps_states = not self.model._supports_default_dynamic_cache()
        if keeps_states and (self.rows == 1 or self.model.config.model_type in IGNORE_PADDING):
            width = max(map(len, encoded))  # such layers forget the padding of a single row
        elif not self.options.inputs.get("flash_attention_causal_mask"):
            width = max(width, SHORTEST)
        elif width == 1 and self.options.reuse_cache:
            raise InputError("--flash_attention_causal_mask: not with --reuse_cache and a prompt of a single token")
        ids, mask = pad_batch(encoded, width, self.rows, self.config.pad_token_id)
        return Texts(ids.to("hpu"), mask.to("hpu"), self._choose_columns(width))

    def is_stopped(self, prompt: list[int], tokens: list[int]) -> bool:
        """Whether an answer is whole, not cut at its longest."""
        return len(tokens) < self.config.max_new_tokens or self._cut(prompt, [*tokens, -1]) == tokens

    def text_of(self, prompt: list[int], tokens: list[int]) -> str:
        """An answer without the token that ended it."""
        return decode_new(self.tokenizer, prompt, tokens[:-1] if tokens[-1] in self.end_tokens else tokens)

    def _choose_columns(self, width: int) -> int:
        """Columns of texts and cache: all that are needed, or those of the first bucket."""
        if self.options.reuse_cache:
            return max(width, self.longest) + self.config.max_new_tokens
        if self.options.bucket_size > 0:
            return -(-(width + 1) // self.options.bucket_size) * self.options.bucket_size
        return width + self.config.max_new_tokens

    def _choose_tokens(
        self, texts: Texts, streamer: TerminalStreamer | None, check: Callable[[], bool]
    ) -> "torch.LongTensor":
        """Greedy or sampled tokens `[rows, new tokens]`; `check` says at some steps whether all have ended."""
        steps_per_check = 1 if texts.rows == 1 else STEPS_PER_CHECK  # the same on every rank
        for step in range(self.config.max_new_tokens):
            scores = self.process(texts, self.forward(texts, step), step)
            if self.config.do_sample:
                import torch

                tokens = torch.multinomial(scores.softmax(1), 1).squeeze(1)
            else:
                tokens = scores.argmax(1)
            texts.append(tokens)
            if streamer is not None:
                streamer.put(tokens.cpu())
            is_looked_at = (self.end_tokens or self.config.stop_strings) and (step + 1) % steps_per_check == 0
            if (step == 0 or is_looked_at) and check():
                break
        if streamer is not None:
            streamer.end()
        self.refuse_nan(self.invalid)
        return texts.tokens[:, texts.width : texts.length]

    def _search_beams(self, texts: Texts, encoded: list[list[int]]) -> "torch.LongTensor":
        """The best texts `[rows * answers per prompt, new tokens]`; strings that end one are looked for on the host."""
        config = self.config
        options = BeamOptions(
            config.num_beams,
            config.length_penalty,
            config.early_stopping,
            config.do_sample,
            config.num_return_sequences,
        )
        beams = Beams(options, texts.rows, config.max_new_tokens, self.end_tokens, texts.tokens.device)
        for step in range(config.max_new_tokens):
            logits = self.forward(texts, step)
            find_stopped = partial(self._find_stopped, encoded, step + 1) if config.stop_strings else None
            rows, tokens = beams.advance(self.process(texts, logits.log_softmax(1), step), find_stopped)
            texts.select(rows)
            texts.append(tokens)
            self.stepper.select(rows)
            may_end = self.end_tokens or config.stop_strings
            if may_end and (step + 1) % STEPS_PER_CHECK == 0 and beams.is_done():
                break
        self.refuse_nan(self.invalid)
        return beams.best()

    def _find_stopped(
        self, encoded: list[list[int]], length: int, candidates: "torch.LongTensor"
    ) -> "torch.BoolTensor":
        """Which candidates `[prompts, n, new tokens]`, of which `length` are there, hold a string that ends them."""
        import torch

        stopped = []
        for prompt, texts in enumerate(candidates[:, :, :length].tolist()):
            ids = encoded[prompt] if prompt < len(encoded) else encoded[0]
            stopped.append([len(self._cut(ids, [*text, -1])) <= length for text in texts])
        return torch.tensor(stopped).to(candidates.device)

    def forward(self, texts: Texts, step: int) -> "torch.FloatTensor":
        """Logits `[rows * copies, vocabulary]` of the next tokens; what came before is run as a graph of its own."""
        from habana_frameworks.torch import core

        core.mark_step()
        if step == 0:
            logits = self.stepper.start(texts, self.copies)
        else:
            is_full = texts.length > texts.columns - 1
            if isinstance(self.stepper, StaticShapes) and is_full and self.options.bucket_size > 0:
                self.stepper.lengthen(texts, self.options.bucket_size)
            logits = self.stepper.step(texts)
        is_nan = logits.isnan().any()
        self.invalid = is_nan if step == 0 else self.invalid | is_nan
        return logits

    def process(self, texts: Texts, scores: "torch.FloatTensor", step: int) -> "torch.FloatTensor":
        """Scores `[rows * copies, vocabulary]`, as the generation config changes the logits."""
        for processor in self.processors:
            scores = processor(texts, scores, step)
        return scores

    def refuse_nan(self, invalid: "torch.BoolTensor") -> None:
        if invalid and not self.config.remove_invalid_values:
            raise InputError(
                "the model gives NaN for scores; its weights are damaged, or its numbers too large for this type "
                "(try without, or with, --bf16)"
            )

    def _all_ended(self, texts: Texts, encoded: list[list[int]]) -> bool:
        """Whether every row has an end. Looks on the host: torch operations on the device would be new graphs."""
        rows = texts.tokens.tolist()
        if not self.end_tokens and not self.config.stop_strings:
            return False
        for row, tokens in enumerate(rows):
            prompt = encoded[min(row // self.answers_per_prompt, len(encoded) - 1)]
            new = tokens[texts.width : texts.length]
            if len(self._cut(prompt, [*new, -1])) > len(new):
                return False
        return True

    def _cut(self, prompt: list[int], tokens: list[int]) -> list[int]:
        """The tokens up to and with the first that ends the text."""
        tokens = next((tokens[: n + 1] for n, token in enumerate(tokens) if token in self.end_tokens), tokens)
        strings = self.config.stop_strings
        if not strings:
            return tokens
        strings = [strings] if isinstance(strings, str) else strings
        said = [token for token in tokens if token >= 0]
        start, whole = self.tokenizer.batch_decode([prompt, prompt + said], clean_up_tokenization_spaces=False)
        if not any(string in whole[max(0, len(start) - len(string) + 1) :] for string in strings):
            return tokens  # the usual case, in one pass
        for number in range(1, len(tokens) + 1):
            if tokens[number - 1] < 0:
                break
            known = self.tokenizer.decode(prompt + tokens[: number - 1], clean_up_tokenization_spaces=False)
            whole = self.tokenizer.decode(prompt + tokens[:number], clean_up_tokenization_spaces=False)
            if any(string in whole[max(0, len(known) - len(string) + 1) :] for string in strings):
                return tokens[:number]
        return tokens
