"""Samples to token ids and labels: the prompt stands in front; the answer is learnt, and so is its end.

`encode_prompt` alone decides with which ids a model is asked. Training puts the same ids in front of the first token
that it learns, and run_generation.py asks with them.
"""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from align.data.chats import ChatTemplate, Rendering, wants_parts, with_parts
from align.data.formats import Messages, RowError, Sample
from align.data.packing import IGNORED
from align.errors import InputError, one_line

CHAT_TEMPLATES = {
    # Ends every answer with the tokenizer's own EOS, so it needs no token that the model has never seen.
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] | capitalize }}: "
        "{{ message['content'] | trim }}{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
LOST_END = "cut: lost its end, and the token that ends it"
LOST_START = "cut: lost the start of its prompt"
LOST_PROMPT_END = "cut: lost the end of its prompt, where the question tends to be"
LOST_BEGINNING = "cut: lost its beginning"
UNKNOWN = "characters that the tokenizer does not know have become its unk_token"
WINDOW = 4  # tokens of the prompt that an answer is encoded behind
MARK = "\ue000"  # joins no other character to a token


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, tools: list[dict] | None = None
) -> list[int]:
    """The ids that a model is asked with: messages by the chat template, which decides about BOS; text with the BOS
    that the tokenizer adds, without the blanks at its end (tokenizers join them to the answer's first word)."""
    if isinstance(prompt, str):
        head, ids = _find_head(tokenizer), tokenizer(clean_prompt(prompt), add_special_tokens=False).input_ids
        return ids if ids[: len(head)] == head else head + ids
    prompt = with_parts(prompt) if wants_parts(tokenizer) else prompt
    return tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True)


def clean_prompt(prompt: str) -> str:
    """A prompt of text without the blanks at its end: they are the answer's."""
    return prompt.rstrip(" \t")


def _find_head(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of a text: a BOS, nothing, or more than one token."""
    whole, alone = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    starts = (start for start in range(len(whole)) if whole[start : start + len(alone)] == alone)
    return whole[: next(starts, 0)]


class SampleTokenizer:
    """Turns samples into token ids and labels with one tokenizer. BOS, EOS and turns are set here alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool = False):
        if not tokenizer.is_fast:
            raise InputError("--tokenizer_name_or_path: a fast tokenizer (tokenizer.json) is needed to place labels")
        if tokenizer.eos_token_id is None:
            raise InputError("--tokenizer_name_or_path: the tokenizer has no EOS token, so no answer could ever end")
        self.tokenizer = tokenizer
        self.train_on_prompt = train_on_prompt
        self.eos = tokenizer.eos_token_id
        ends = (self.eos, tokenizer.bos_token_id, tokenizer.pad_token_id)
        self.unknown = None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id
        self.head = _find_head(tokenizer)  # which also sets the backend to neither cut nor pad
        self.template = ChatTemplate(tokenizer)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids and labels a text gets, but for the day that some chat templates write:
        a run that goes on after midnight is the same run."""
        parts = (self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.eos, self.head)
        special = self.tokenizer.special_tokens_map
        return hashlib.sha256(repr((parts, special, self.train_on_prompt)).encode()).hexdigest()

    def render(self, sample: Sample, answer: int = 0) -> Rendering:
        """The prompt with one of its answers, as one text."""
        renderings = self.render_turns(sample, answer)
        if len(renderings) > 1:
            raise RowError("the chat template changes earlier turns of an answer once others follow")
        return renderings[0]

    def render_turns(self, sample: Sample, answer: int = 0) -> list[Rendering]:
        """The same as one text, or as several where no single text shows every turn as it is asked for."""
        said: Any = sample.answers[answer]
        asked: Any = sample.prompt
        if not isinstance(said, str):
            return self.template.render(asked, said, sample.tools)
        if not said.strip():
            raise RowError("the answer is empty")
        prompt = clean_prompt(asked)
        text = asked[len(prompt) :] + said
        return [Rendering(prompt, text, ((0, len(text)),), chat=False)]

    def encode(self, renderings: list[Rendering]) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """For each rendering its ids, a mask of what is learnt, and how many ids are the prompt's.

        The prompt is encoded as it is asked, then the answer behind the prompt's last tokens: no token can hold
        characters of both.
        """
        results = []
        for ids, learnt, size in self._encode(renderings):
            if ids[-1:] != [self.eos]:
                ids, learnt = [*ids, self.eos], np.append(learnt, True)
            results.append((np.array(ids, dtype=np.int32), learnt, size))
        return results

    def _encode(self, renderings: list[Rendering]) -> list[tuple[list[int], np.ndarray, int]]:
        """The same without the token that ends a text."""
        if not renderings:
            return []
        texts = list(dict.fromkeys(rendering.prompt for rendering in renderings))
        prompts = dict(zip(texts, self._tokenize(texts), strict=True))
        windows = [_last_characters(rendering.prompt, prompts[rendering.prompt]) for rendering in renderings]
        tails = self._tokenize(
            [window + rendering.answer for window, rendering in zip(windows, renderings, strict=True)]
        )
        results = []
        for rendering, window, tail in zip(renderings, windows, tails, strict=True):
            asked, before = prompts[rendering.prompt].ids, len(window)
            cut = _find_cut(tail, before, asked) if before else 0
            if cut is None:
                tail, before = self._tokenize([MARK + rendering.answer])[0], len(MARK)
                cut = _find_tokens(tail, before, before).start
            ids = [*asked, *tail.ids[cut:]]
            head = [] if rendering.chat or ids[: len(self.head)] == self.head else self.head
            size = len(head) + len(asked)
            learnt = np.full(len(head) + len(ids), self.train_on_prompt)
            for start, end in rendering.spans:
                tokens = _find_tokens(tail, start + before, end + before)
                learnt[size - cut + max(tokens.start, cut) : size - cut + tokens.stop] = True
            is_torn = any(_holds_both_sides(tail, start + before) for start, _ in rendering.spans[1:])
            results.append(self._encode_turn_by_turn(rendering) if is_torn else ([*head, *ids], learnt, size))
        return results

    def _encode_turn_by_turn(self, rendering: Rendering) -> tuple[list[int], np.ndarray, int]:
        """A chat of which a token would hold characters of a later turn and of what that is asked with."""
        starts = [0, *(start for start, _ in rendering.spans[1:]), len(rendering.answer)]
        turns = [
            replace(
                rendering,
                prompt=rendering.prompt + rendering.answer[:start],
                answer=rendering.answer[start:end],
                spans=((first - start, last - start),),
            )
            for (first, last), (start, end) in zip(rendering.spans, pairwise(starts), strict=True)
        ]
        (ids, learnt, size), *later = self._encode(turns)
        for more, mask, before in later:
            ids, learnt = ids + more[before:], np.append(learnt, mask[before:])
        return ids, learnt, size

    def count_head(self, ids: np.ndarray) -> int:
        """How many ids at the start stay when a prompt is cut there: those that tokenizer or template begin with."""
        if self.head and list(ids[: len(self.head)]) == self.head:
            return len(self.head)
        return int(len(ids) > 0 and ids[0] == self.tokenizer.bos_token_id)

    def find_unknown(self, ids: np.ndarray) -> tuple[str, ...]:
        """A note where characters were lost."""
        return (UNKNOWN,) if self.unknown is not None and (ids == self.unknown).any() else ()

    def _tokenize(self, texts: list[str]) -> list[Encoding]:
        return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def _last_characters(text: str, encoding: Encoding) -> str:
    """The characters of the last tokens, which may change how the text behind them is cut into tokens."""
    if len(encoding) <= WINDOW:
        return text
    return text[encoding.token_to_chars(len(encoding) - WINDOW)[0] :]


def _find_cut(encoding: Encoding, character: int, before: list[int]) -> int | None:
    """The token that begins at this character, where there is one and those in front of it end as `before` does."""
    cut = _find_tokens(encoding, character, character).start
    parts = cut == len(encoding) or encoding.token_to_chars(cut)[0] >= character
    return cut if parts and encoding.ids[:cut][-1:] == before[-1:] else None


def _find_tokens(encoding: Encoding, start: int, end: int) -> slice:
    """The tokens with any character of a span: by bisection, as all offsets in Python would cost more than the ids."""
    tokens = range(len(encoding))
    first = bisect_right(tokens, start, key=lambda token: encoding.token_to_chars(token)[1])
    return slice(first, bisect_left(tokens, end, key=lambda token: encoding.token_to_chars(token)[0]))


def _holds_both_sides(encoding: Encoding, character: int) -> bool:
    """Whether a token holds this character together with those in front of it."""
    token = encoding.char_to_token(character)
    return token is not None and encoding.token_to_chars(token)[0] < character


Columns = tuple[dict[str, list], list[str | None], list[tuple[str, ...]]]


def tokenize_samples(samples: list[Sample], tokenizer: SampleTokenizer, max_length: int, truncation: str) -> Columns:
    """Columns `input_ids`, `labels`, `length`, `trained` (tokens that give a loss), `sample` (its index: a chat may
    become several rows); why a row is dropped; notes."""
    columns = {"input_ids": [], "labels": [], "length": [], "trained": [], "sample": []}
    reasons, notes = [], []
    owners, renderings = [], []
    for number, sample in enumerate(samples):
        parts = tokenizer.render_turns(sample)
        if sample.notes:
            parts[0] = replace(parts[0], notes=sample.notes + parts[0].notes)
        owners += [number] * len(parts)
        renderings += parts
    for owner, rendering, (ids, learnt, asked) in zip(owners, renderings, tokenizer.encode(renderings), strict=True):
        reason, told = None, rendering.notes + tokenizer.find_unknown(ids)
        if len(ids) > max_length:
            if truncation == "drop":
                reason = "longer than --max_seq_length"
            elif truncation == "keep_start":
                ids, learnt = ids[:max_length], learnt[:max_length]
                told += (LOST_END,)
            else:
                head = tokenizer.count_head(ids)
                keep = np.r_[:head, len(ids) - max_length + head : len(ids)]
                ids, learnt = ids[keep], learnt[keep]
                told += (LOST_START if asked else LOST_BEGINNING,)
        labels = np.where(learnt, ids, IGNORED)
        labels[:1] = IGNORED  # nothing predicts the first token
        trained = int(np.count_nonzero(learnt[1:]))
        reasons.append(reason or (None if trained else "nothing left to learn after truncation"))
        notes.append(told)
        for name, value in zip(columns, (ids, labels, len(ids), trained, owner), strict=True):
            columns[name].append(value)
    return columns, reasons, notes


def tokenize_pairs(
    samples: list[Sample], tokenizer: SampleTokenizer, max_prompt_length: int, max_length: int, truncation: str
) -> Columns:
    """Columns `prompt_input_ids`, `chosen_input_ids`, `rejected_input_ids`, `chosen_labels`, `rejected_labels` (the
    tokens that are scored), `length` (of prompt and both answers), `sample` (its index); why a pair is dropped; notes.

    Limits are in tokens: the prompt is cut to `max_prompt_length`, then each answer so that prompt and answer fit
    `max_length`.
    """
    answers_columns = ("chosen_input_ids", "rejected_input_ids", "chosen_labels", "rejected_labels")
    names = ("prompt_input_ids", *answers_columns, "length", "sample")
    columns = {name: [] for name in names}
    reasons, notes = [], []
    renderings = [tokenizer.render(sample, answer) for sample in samples for answer in (0, 1)]
    for number, rendering in enumerate(renderings):
        if rendering.prompt != renderings[number - number % 2].prompt:
            raise RowError("the chat template does not show chosen and rejected behind the same prompt")
    encoded = tokenizer.encode(renderings)
    for number, sample in enumerate(samples):
        both: list[Any] = encoded[2 * number : 2 * number + 2]
        told = sample.notes
        for rendering in renderings[2 * number : 2 * number + 2]:
            told += tuple(note for note in rendering.notes if note not in told)
        told += tokenizer.find_unknown(np.concatenate([parts[0] for parts in both]))
        prompt = both[0][0][: both[0][2]]
        answers, scored = ([parts[place][parts[2] :] for parts in both] for place in (0, 1))
        reason = "chosen and rejected are the same" if np.array_equal(*answers) else None
        head = tokenizer.count_head(prompt)
        if len(prompt) > max_prompt_length:
            reason = reason or ("prompt longer than --max_prompt_length" if truncation == "drop" else None)
            cut = len(prompt) - max_prompt_length
            keep_end = np.append(prompt[:head], prompt[head + cut :])
            prompt = prompt[:max_prompt_length] if truncation == "keep_start" else keep_end
            told += (LOST_PROMPT_END if truncation == "keep_start" else LOST_START,)
        room = max_length - len(prompt)
        if max(map(len, answers)) > room:
            reason = reason or ("pair longer than --max_length" if truncation == "drop" else None)
            answers = [answer[:room] for answer in answers]
            told += (LOST_END,)
            if np.array_equal(*answers):
                reason = reason or "chosen and rejected are the same after truncation"
        labels = [np.where(mask[:room], ids, IGNORED) for ids, mask in zip(answers, scored, strict=True)]
        if min((each != IGNORED).sum() for each in labels) == 0:
            reason = reason or "nothing left to score after truncation"
        reasons.append(reason)
        notes.append(told)
        values = (prompt, *answers, *labels, len(prompt) + sum(map(len, answers)), number)
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return columns, reasons, notes


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Gives the tokenizer the template that --chat_template names: one of ours, or a file's."""
    if chat_template is None:
        return
    if chat_template == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        raise InputError("--chat_template chatml: the tokenizer has no <|im_end|>; use plain, which needs no new token")
    tokenizer.chat_template = CHAT_TEMPLATES.get(chat_template) or _read_template(Path(chat_template))


def _read_template(path: Path) -> str:
    """A Jinja template, which may also be the `chat_template` of a JSON file, as transformers has written it."""
    if not path.is_file():
        known = ", ".join(CHAT_TEMPLATES)
        raise InputError(f"--chat_template: {str(path)!r} is not a file; name one, or choose from {known}")
    try:
        text: Any = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json" and re.match(r'\s*{\s*"', text):  # and not {{ or {%
            text = dict(json.loads(text)).get("chat_template")
            if isinstance(text, list):  # templates by name, as older models have them
                text = {each["name"]: each["template"] for each in text}.get("default")
        if not isinstance(text, str) or "messages" not in text:
            raise InputError(f"--chat_template: {path} holds no template of `messages`")
        _compile_jinja_template(text)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"--chat_template: {path} cannot be read: {one_line(error)}") from error
    except TemplateSyntaxError as error:
        raise InputError(f"--chat_template: {path}, line {error.lineno}: {one_line(error)}") from error
    return text
