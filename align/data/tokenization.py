"""Samples to token ids and labels: chat templates, one BOS, a learnt end, truncation that leaves something to learn."""

import hashlib
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from align.data.formats import Messages, RowError, Sample
from align.data.packing import IGNORED
from align.errors import InputError

CHAT_TEMPLATES = {
    # Ends every answer with the tokenizer's own EOS, so it needs no token that the model has never seen.
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] | capitalize }}: "
        "{{ message['content'] | trim }}{{ eos_token if message['role'] == 'assistant' else '' }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


@dataclass(frozen=True)
class Rendering:
    """A sample as the model reads it, and the spans of characters that it shall learn to say."""

    text: str
    spans: tuple[tuple[int, int], ...]


class SampleTokenizer:
    """Turns samples into token ids and labels with one tokenizer; BOS, EOS and turns are set here and nowhere else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on_prompt: bool = False):
        if not tokenizer.is_fast:
            raise InputError("--tokenizer_name_or_path: a fast tokenizer (tokenizer.json) is needed to place labels")
        if tokenizer.eos_token_id is None:
            raise InputError("--tokenizer_name_or_path: the tokenizer has no EOS token, so no answer could ever end")
        self.tokenizer = tokenizer
        self.train_on_prompt = train_on_prompt
        self.eos = tokenizer.eos_token_id
        first = tokenizer("a").input_ids[:1]
        self.bos = [tokenizer.bos_token_id] if first == [tokenizer.bos_token_id] else []
        ends = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        if tokenizer.bos_token != tokenizer.eos_token:
            ends.discard(tokenizer.bos_token)
        self.turn_end = re.compile(r"\s*(?:" + "|".join(map(re.escape, sorted(ends, key=len, reverse=True))) + ")")

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids and labels a text gets."""
        parts = (self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.chat_template, self.eos, self.bos)
        return hashlib.sha256(repr((parts, self.train_on_prompt)).encode()).hexdigest()

    def render(self, sample: Sample, answer: int = 0) -> Rendering:
        """The text of the prompt with one of its answers."""
        said = sample.answers[answer]
        if isinstance(said, str):
            if not said.strip():
                raise RowError("the answer is empty")
            # A blank between prompt and answer is learnt: tokenizers tend to join it with the answer's first word.
            start = len(sample.prompt.rstrip())
            return Rendering(sample.prompt + said, ((start, len(sample.prompt) + len(said)),))
        return self._render_messages(sample.prompt, said)

    def _render_messages(self, prompt: Messages, answer: Messages) -> Rendering:
        """Finds the assistant's turns in any template: rendered once as they are and once with marks in their place."""
        messages = prompt + answer
        marks = {
            number: f"\ue000{number}\ue001"
            for number in range(len(prompt), len(messages))
            if messages[number]["role"] == "assistant"
        }
        marked = [
            {**message, "content": marks[number]} if number in marks else message
            for number, message in enumerate(messages)
        ]
        text, between = self._apply_template(messages), []
        rest = self._apply_template(marked)
        for mark in marks.values():
            before, _, rest = rest.partition(mark)
            between.append(before)
        spans, end = [], 0
        for number, before, after in zip(marks, between, [*between[1:], rest], strict=True):
            said = (messages[number]["content"], messages[number]["content"].strip())
            shown = next((words for words in said if text.startswith(before + words + after, end)), None)
            if shown is None:
                raise RowError(f"the chat template does not show message {number + 1} as it is")
            start = end + len(before)
            end = start + len(shown)
            closing = self.turn_end.match(text, end)
            spans.append((start, closing.end() if closing else end))
        return Rendering(text[: spans[-1][1]], tuple(spans))  # nothing behind the last span is learnt

    def _apply_template(self, messages: Messages) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # jinja2 errors and whatever a template raises on its own
            raise RowError(f"the chat template refuses it: {error}") from error

    def encode(self, renderings: list[Rendering]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each rendering its ids and a mask of what is learnt: BOS where the model wants one, EOS at the end."""
        if not renderings:
            return []
        encoded = self.tokenizer(
            [rendering.text for rendering in renderings],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        results = []
        for rendering, ids, encoding in zip(renderings, encoded.input_ids, encoded.encodings, strict=True):
            ids = np.array(ids, dtype=np.int32)
            learnt = np.full(len(ids), self.train_on_prompt)
            for start, end in rendering.spans:
                learnt[_find_tokens(encoding, start, end)] = True
            if self.bos and ids[:1] != self.bos:
                ids, learnt = np.append(np.int32(self.bos), ids), np.append(self.train_on_prompt, learnt)
            if ids[-1:] != [self.eos]:
                ids, learnt = np.append(ids, np.int32(self.eos)), np.append(learnt, True)
            results.append((ids, learnt))
        return results


def _find_tokens(encoding: Encoding, start: int, end: int) -> slice:
    """The tokens with any character of a span: by bisection, as all offsets in Python would cost more than the ids."""
    tokens = range(len(encoding))
    first = bisect_right(tokens, start, key=lambda token: encoding.token_to_chars(token)[1])
    return slice(first, bisect_left(tokens, end, key=lambda token: encoding.token_to_chars(token)[0]))


def tokenize_samples(
    samples: list[Sample], tokenizer: SampleTokenizer, max_length: int, truncation: str
) -> tuple[dict[str, list], list[str | None]]:
    """Columns `input_ids`, `labels`, `length`, `trained` (tokens that give a loss), and why a sample is dropped."""
    columns = {"input_ids": [], "labels": [], "length": [], "trained": []}
    reasons = []
    for ids, learnt in tokenizer.encode([tokenizer.render(sample) for sample in samples]):
        reason = None
        if len(ids) > max_length:
            if truncation == "drop":
                reason = "longer than --max_seq_length"
            elif truncation == "keep_start":
                ids, learnt = ids[:max_length], learnt[:max_length]
            else:
                head = len(tokenizer.bos)
                keep = np.r_[:head, len(ids) - max_length + head : len(ids)]
                ids, learnt = ids[keep], learnt[keep]
        labels = np.where(learnt, ids, IGNORED)
        labels[:1] = IGNORED  # nothing predicts the first token
        trained = int((labels != IGNORED).sum())
        reasons.append(reason or (None if trained else "nothing left to learn after truncation"))
        for name, value in zip(columns, (ids, labels, len(ids), trained), strict=True):
            columns[name].append(value)
    return columns, reasons


def tokenize_pairs(
    samples: list[Sample], tokenizer: SampleTokenizer, max_prompt_length: int, max_length: int, truncation: str
) -> tuple[dict[str, list], list[str | None]]:
    """Columns `prompt_input_ids`, `chosen_input_ids`, `rejected_input_ids`, `length` (of all three together).

    Limits are in tokens: the prompt is cut to `max_prompt_length`, then each answer so that prompt and answer fit
    `max_length`.
    """
    columns = {"prompt_input_ids": [], "chosen_input_ids": [], "rejected_input_ids": [], "length": []}
    reasons = []
    renderings = [tokenizer.render(sample, answer) for sample in samples for answer in (0, 1)]
    encoded = tokenizer.encode(renderings)
    for number in range(len(samples)):
        both = encoded[2 * number : 2 * number + 2]
        prompt, answers = _split_prompt(both, tokenizer, renderings[2 * number : 2 * number + 2])
        reason = "chosen and rejected are the same" if np.array_equal(*answers) else None
        head = len(tokenizer.bos)
        if len(prompt) > max_prompt_length:
            reason = reason or ("prompt longer than --max_prompt_length" if truncation == "drop" else None)
            cut = len(prompt) - max_prompt_length
            keep_end = np.append(prompt[:head], prompt[head + cut :])
            prompt = prompt[:max_prompt_length] if truncation == "keep_start" else keep_end
        room = max_length - len(prompt)
        if max(map(len, answers)) > room:
            reason = reason or ("pair longer than --max_length" if truncation == "drop" else None)
            answers = [answer[:room] for answer in answers]
            if np.array_equal(*answers):
                reason = reason or "chosen and rejected are the same after truncation"
        reasons.append(reason)
        values = (prompt, *answers, len(prompt) + sum(map(len, answers)))
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return columns, reasons


def _split_prompt(both, tokenizer: SampleTokenizer, renderings: list[Rendering]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Cuts two encodings of one prompt at the same token, so that the prompt's ids are the same in both.

    Where a merge of the tokenizer joins the prompt's end with an answer, that token belongs to the answer; where this
    would leave two different prompts, prompt and answers are encoded apart.
    """
    cut = min(int(np.argmax(learnt)) for _, learnt in both)
    prompts = [ids[:cut] for ids, _ in both]
    if cut and np.array_equal(*prompts):
        return prompts[0], [ids[cut:] for ids, _ in both]
    start = renderings[0].spans[0][0]
    apart = [Rendering(rendering.text[start:], ((0, len(rendering.text) - start),)) for rendering in renderings]
    head = tokenizer.encode([Rendering(renderings[0].text[:start], ())])[0][0][:-1]
    return head, [ids[len(tokenizer.bos) :] for ids, _ in tokenizer.encode(apart)]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
    """Gives the tokenizer the template that --chat_template names: one of ours, or a file's."""
    if chat_template is None:
        return
    if chat_template == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
        raise InputError("--chat_template chatml: the tokenizer has no <|im_end|>; use plain, which needs no new token")
    if chat_template in CHAT_TEMPLATES:
        tokenizer.chat_template = CHAT_TEMPLATES[chat_template]
    elif Path(chat_template).is_file():
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    else:
        known = ", ".join(CHAT_TEMPLATES)
        raise InputError(f"--chat_template: {chat_template!r} is no file; name one, or choose from {known}")
