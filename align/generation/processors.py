"""What a generation config does to the scores of the next token, on static shapes and for text alone.

transformers' own processors take padding for text, of which static shapes have a lot, and ask the device for tokens at
every step. Those that look at earlier tokens are therefore computed here from `Texts`; what they compute, and their
order, is transformers 4.55's (generation/utils.py, `_get_logits_processor`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from align.generation.stepping import Texts

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

Processor = Callable[[Texts, "torch.FloatTensor", int], "torch.FloatTensor"]  # scores [rows, vocabulary], step from 0
NEVER = float("-inf")


def make_processors(config: "GenerationConfig", end_tokens: list[int]) -> list[Processor]:
    """Those that `config` asks for, in transformers' order. Without `end_tokens` none keeps a text from ending."""
    from transformers.generation import logits_process as theirs

    processors: list[Processor] = []
    if config.sequence_bias:
        processors.append(SequenceBias(_read_biases(config.sequence_bias)))
    if (config.repetition_penalty or 1.0) != 1.0:
        processors.append(RepetitionPenalty(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatedNgram(config.no_repeat_ngram_size))
    if config.bad_words_ids:
        words = [tuple(word) for word in config.bad_words_ids if list(word) not in [[end] for end in end_tokens]]
        processors.append(SequenceBias(dict.fromkeys(words, NEVER)))
    if end_tokens and (config.min_length or config.min_new_tokens):
        processors.append(LeastLength(config.min_length or 0, config.min_new_tokens or 0, end_tokens))
    if config.forced_eos_token_id is not None:
        forced = config.forced_eos_token_id
        processors.append(ForcedEnd(config.max_new_tokens - 1, forced if isinstance(forced, list) else [forced]))
    if config.remove_invalid_values:
        processors.append(_rowwise(theirs.InfNanRemoveLogitsProcessor()))
    if config.suppress_tokens:
        processors.append(Suppressed(config.suppress_tokens))
    if config.begin_suppress_tokens:
        processors.append(Suppressed(config.begin_suppress_tokens, only_step=0))
    if config.do_sample:
        processors += map(_rowwise, _make_warpers(config, len(end_tokens)))
    if config.renormalize_logits:
        processors.append(_rowwise(theirs.LogitNormalization()))
    return processors


def _make_warpers(config: "GenerationConfig", number_of_ends: int) -> list:
    """transformers' own: they look at one row's scores alone. Beams keep a token that ends no text."""
    from transformers.generation import logits_process as theirs

    keep = number_of_ends + 1 if config.num_beams > 1 else 1
    warpers: list = []
    if (config.temperature or 1.0) != 1.0:
        warpers.append(theirs.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        warpers.append(theirs.TopKLogitsWarper(config.top_k, min_tokens_to_keep=keep))
    if config.top_p is not None and config.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(config.top_p, min_tokens_to_keep=keep))
    if config.min_p is not None:
        warpers.append(theirs.MinPLogitsWarper(config.min_p, min_tokens_to_keep=keep))
    if config.typical_p is not None and config.typical_p < 1:
        warpers.append(theirs.TypicalLogitsWarper(config.typical_p, min_tokens_to_keep=keep))
    if 0 < (config.epsilon_cutoff or 0) < 1:
        warpers.append(theirs.EpsilonLogitsWarper(config.epsilon_cutoff, min_tokens_to_keep=keep))
    if 0 < (config.eta_cutoff or 0) < 1:
        warpers.append(theirs.EtaLogitsWarper(config.eta_cutoff, min_tokens_to_keep=keep, device="hpu"))
    return warpers


def _rowwise(processor: Any) -> Processor:
    return lambda _, scores, step: processor(None, scores)


def _read_biases(biases: Any) -> dict[tuple[int, ...], float]:
    """`{(ids): bias}` or, as JSON has no tuples for keys, `[[[ids], bias]]`."""
    return dict(biases) if isinstance(biases, dict) else {tuple(ids): bias for ids, bias in biases}


@lru_cache
def _as_tensor(tokens: tuple[int, ...], device: "torch.device") -> "torch.LongTensor":
    """Kept on the device, as every step asks for the same ones."""
    import torch

    return torch.tensor(tokens, dtype=torch.long, device=device)


@lru_cache
def _marked(tokens: tuple[int, ...], vocabulary: int, device: "torch.device") -> "torch.BoolTensor":
    import torch

    marked = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    return marked.index_fill_(0, _as_tensor(tuple(token for token in tokens if token < vocabulary), device), True)


def _mark(tokens: list[int], scores: "torch.FloatTensor") -> "torch.BoolTensor":
    """`[vocabulary]`, true for `tokens`."""
    return _marked(tuple(tokens), scores.shape[1], scores.device)


@dataclass(frozen=True)
class RepetitionPenalty:
    """The penalty of CTRL (arXiv 1909.05858): logits of tokens that were said are divided, negative ones multiplied."""

    penalty: float

    def __call__(self, texts: Texts, scores: "torch.FloatTensor", step: int) -> "torch.FloatTensor":
        # Where there is no text, a token that is: the last one of the prompt.
        tokens = texts.tokens.where(texts.mask == 1, texts.tokens[:, texts.width - 1 : texts.width])
        said = scores.gather(1, tokens)
        return scores.scatter(1, tokens, (said / self.penalty).where(said > 0, said * self.penalty))


@dataclass(frozen=True)
class NoRepeatedNgram:
    """Forbids each token that would make a sequence of `size` tokens that the text has already."""

    size: int

    def __call__(self, texts: Texts, scores: "torch.FloatTensor", step: int) -> "torch.FloatTensor":
        if self.size > texts.columns:
            return scores
        earlier = texts.masked().unfold(1, self.size, 1)  # [rows, columns - size + 1, size]
        repeats = (earlier >= 0).all(-1)
        if self.size > 1:
            repeats = repeats & (earlier[..., :-1] == texts.last(self.size - 1)[:, None]).all(-1)
        nobody = scores.shape[1]
        tokens = earlier[..., -1].where(repeats, nobody)
        forbidden = scores.new_zeros(scores.shape[0], nobody + 1).scatter(1, tokens, 1.0)[:, :nobody]
        return scores.masked_fill(forbidden > 0, NEVER)


@dataclass(frozen=True)
class SequenceBias:
    """Adds to the score of the last token of a sequence where the text ends with the rest of it."""

    biases: dict[tuple[int, ...], float]

    def __call__(self, texts: Texts, scores: "torch.FloatTensor", step: int) -> "torch.FloatTensor":
        import torch

        added = torch.zeros_like(scores)
        lengths = texts.mask.sum(1)
        for (*start, last), bias in self.biases.items():
            if last >= scores.shape[1]:
                continue
            if not start:
                added[:, last] += bias
                continue
            follows = (texts.last(len(start)) == _as_tensor(tuple(start), scores.device)).all(1)
            follows = follows & (lengths > len(start))  # as transformers, which wants one token more
            added[:, last] += torch.zeros_like(added[:, last]).masked_fill(follows, bias)
        return scores + added


@dataclass(frozen=True)
class LeastLength:
    """No text ends before it has `tokens` with its prompt and `new_tokens` without."""

    tokens: int
    new_tokens: int
    end_tokens: list[int]

    def __call__(self, texts: Texts, scores: "torch.FloatTensor", step: int) -> "torch.FloatTensor":
        if step >= max(self.new_tokens, self.tokens):
            return scores
        is_short = texts.mask.sum(1) < self.tokens
        if step < self.new_tokens:
            is_short = is_short | True
        return scores.masked_fill(is_short[:, None] & _mark(self.end_tokens, scores), NEVER)


@dataclass(frozen=True)
class ForcedEnd:
    """The last token is one of `end_tokens`."""

    last_step: int
    end_tokens: list[int]

    def __call__(self, texts: Texts, scores: "torch.FloatTensor", step: int) -> "torch.FloatTensor":
        if step != self.last_step:
            return scores
        return scores.new_full(scores.shape, NEVER).masked_fill(_mark(self.end_tokens, scores), 0.0)


@dataclass(frozen=True)
class Suppressed:
    """Tokens that are never said, or not at one step."""

    tokens: list[int]
    only_step: int | None = None

    def __call__(self, texts: Texts, scores: "torch.FloatTensor", step: int) -> "torch.FloatTensor":
        if self.only_step is not None and step != self.only_step:
            return scores
        return scores.masked_fill(_mark(self.tokens, scores), NEVER)
