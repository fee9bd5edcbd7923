"""Token ids in, token ids out: end tokens, streaming and timing around optimum-habana's generation loop.

Heavy packages are imported where they are used: imports are most of the time to the first word.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.errors import InputError
from align.generation.prompts import pad_batch

if TYPE_CHECKING:
    import torch
    from optimum.habana.transformers.generation import GaudiGenerationConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHORTEST = 4  # columns of a prompt: a reused cache takes one for a decoding step, and Mamba convolves four
STEPS_PER_CHECK = 8  # the end tokens are looked for this often: each look waits for the device


@dataclass(frozen=True)
class Timing:
    """Of one batch: seconds to its first tokens (None with beams) and its end, tokens of prompts and answers, steps."""

    first_token: float | None
    total: float
    prompt_tokens: int
    new_tokens: int
    steps: int


class EndWatch:
    """Stopping criterion: ends a batch once every row has said an end token, and notes when the first token came.

    optimum-habana 1.21.2's own criterion blanks the rows that have no end token when another row has one
    (generation/utils.py:2993), so end tokens are left to this one. It looks every `steps_per_check` tokens.
    """

    def __init__(self, end_tokens: list[int], width: int, steps_per_check: int):
        self.end_tokens = end_tokens
        self.width = width
        self.steps_per_check = steps_per_check
        self.first_token_at: float | None = None

    def __call__(self, input_ids: "torch.LongTensor", scores: Any, token_idx: int | None = None, **_: Any) -> bool:
        length = token_idx or input_ids.shape[1]
        step = length - self.width
        if self.first_token_at is not None and (not self.end_tokens or step % self.steps_per_check):
            return False
        texts = input_ids.tolist()  # what torch would do from here on were graphs
        self.first_token_at = self.first_token_at or time.perf_counter()
        return all(any(token in self.end_tokens for token in ids[self.width : length]) for ids in texts)


class RepetitionPenalty:
    """Logits processor: the penalty of CTRL (arXiv 1909.05858), for text alone.

    transformers' own takes padding for text, of which static shapes have a lot: where the pad token is EOS, no text
    would end.
    """

    def __init__(self, penalty: float, pad: int):
        self.penalty = penalty
        self.pad = pad

    def __call__(self, input_ids: "torch.LongTensor", scores: "torch.FloatTensor") -> "torch.FloatTensor":
        said = scores.gather(1, input_ids)
        said = (said / self.penalty).where(said > 0, said * self.penalty)
        penalised = scores.scatter(1, input_ids, said)
        penalised[:, self.pad] = scores[:, self.pad]
        return penalised


class TerminalStreamer:
    """Shows one text as it appears, by whole characters."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], end_tokens: list[int]):
        self.tokenizer = tokenizer
        self.prompt_ids = prompt_ids
        self.end_tokens = end_tokens
        self.new_ids: list[int] | None = None
        self.shown = ""

    def put(self, ids: "torch.LongTensor") -> None:
        if self.new_ids is None:  # the first call brings the prompt
            self.new_ids = []
            return
        self.new_ids += [token for token in ids.tolist() if token not in self.end_tokens]
        text = decode_new(self.tokenizer, self.prompt_ids, self.new_ids)
        if not text.endswith("\ufffd"):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def end(self) -> None:
        print(decode_new(self.tokenizer, self.prompt_ids, self.new_ids or [])[len(self.shown) :])


def decode_new(tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int], new_ids: list[int]) -> str:
    """The text that `new_ids` add to the prompt; decoded alone, many tokenizers would lose a leading blank."""
    prompt, whole = tokenizer.batch_decode(
        [prompt_ids, prompt_ids + new_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return whole[len(prompt) :]


@dataclass(frozen=True)
class TextGenerator:
    """A model on its card, with its tokenizer and how to decode; a batch has `rows` prompts."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    config: "GaudiGenerationConfig"
    end_tokens: list[int]
    repetition_penalty: float
    use_hpu_graphs: bool
    rows: int

    def generate(
        self, encoded: list[list[int]], width: int, streamer: TerminalStreamer | None = None
    ) -> tuple[list[list[int]], Timing]:
        """New tokens of each prompt up to its first end token, which is included, and how long they took."""
        start = time.perf_counter()
        if not self.config.flash_attention_causal_mask:
            width = max(width, SHORTEST)
        elif width == 1 and self.config.reuse_cache:
            raise InputError("--flash_attention_causal_mask: not with --reuse_cache and a prompt of a single token")
        ids, mask = pad_batch(encoded, width, self.rows, self.config.pad_token_id)
        watch = EndWatch(self.end_tokens, width, 1 if self.rows == 1 else STEPS_PER_CHECK)  # the same on every rank
        beams = self.config.num_beams > 1
        penalty = RepetitionPenalty(self.repetition_penalty, self.config.pad_token_id)
        output = self.model.generate(
            input_ids=ids.to("hpu"),
            attention_mask=mask.to("hpu"),
            generation_config=self.config,
            use_model_defaults=False,
            stopping_criteria=[] if beams else [watch],
            logits_processor=[penalty] if self.repetition_penalty != 1 else [],
            streamer=streamer,
            lazy_mode=True,
            hpu_graphs=self.use_hpu_graphs,
        )
        texts = output.tolist()[: len(encoded)]
        end = time.perf_counter()
        new = [cut_after_end(ids[width : width + self.config.max_new_tokens], self.end_tokens) for ids in texts]
        lengths = list(map(len, new))
        first_token = None if beams else (watch.first_token_at or end) - start
        return new, Timing(first_token, end - start, sum(map(len, encoded)), sum(lengths), max(lengths))


def cut_after_end(tokens: list[int], end_tokens: list[int]) -> list[int]:
    """The tokens up to the first end token, which is included."""
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in end_tokens), tokens)
