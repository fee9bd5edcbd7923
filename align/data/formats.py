"""Which columns make which format, and a row of each as one thing: a prompt and its answers.

Adding a format is adding a row to `FORMATS`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import InputError

Row = Mapping[str, Any]
Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant", "tool")


class RowError(ValueError):
    """One row cannot be used; the message says why, the caller knows which row it is."""


@dataclass(frozen=True)
class Sample:
    """A prompt and what may follow it, all as text or all as messages; two answers are chosen and rejected."""

    prompt: str | Messages
    answers: tuple[str, ...] | tuple[Messages, ...]


@dataclass(frozen=True)
class Format:
    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Sample]
    example: str
    preference: bool = False


def _text(row: Row, column: str, may_be_empty: bool = False) -> str:
    value = row.get(column)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise RowError(f"column `{column}` is {_describe(value)}, not text")
    if not value.strip() and not may_be_empty:
        raise RowError(f"column `{column}` is empty")
    return value


def _describe(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _messages(value: Any, column: str) -> Messages:
    """Checked messages with role and content alone: system first if at all, users and assistants in turn."""
    if not isinstance(value, list) or not value:
        raise RowError(f"column `{column}` is {_describe(value or None)}, not a list of messages")
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping):
            raise RowError(f"column `{column}`, message {number} is {_describe(message)}, not role and content")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise RowError(f"column `{column}`, message {number}: `{key}` is {_describe(message.get(key))}")
        if message["role"] not in ROLES:
            raise RowError(f"column `{column}`, message {number}: role {message['role']!r} is none of {ROLES}")
    roles = [message["role"] for message in value]
    for number, (before, role) in enumerate(zip([None, *roles], roles, strict=False), 1):
        if not _may_follow(role, before):
            raise RowError(f"column `{column}`, message {number}: role {role!r} after {before!r} is out of order")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _may_follow(role: str, before: str | None) -> bool:
    return before is None or (role != "system" and (role != before or role == "tool"))


def _answer_messages(value: Any, column: str) -> Messages:
    messages = _messages(value, column)
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise RowError(f"column `{column}` does not end with an answer of the assistant")
    return messages


def _split(prompt: Messages, answer: Messages, column: str) -> tuple[Messages, Messages]:
    """What comes before the assistant's answer, and that; the column may repeat the prompt, and what came before it."""
    messages, end = prompt + answer, len(prompt)
    alone = answer[0]["role"] == "assistant"  # then a later turn may well repeat the prompt
    for start in range(1 if alone else len(answer) - len(prompt) + 1):
        if _without_blanks(answer[start : start + len(prompt)]) == _without_blanks(prompt):
            messages, end = answer, start + len(prompt)
            break
    if end == len(messages):
        raise RowError(f"column `{column}` has no answer behind the prompt")
    before, role = messages[end - 1]["role"], messages[end]["role"]
    if not _may_follow(role, before):
        raise RowError(f"column `{column}` neither repeats nor follows the prompt: role {role!r} after {before!r}")
    while messages[end]["role"] != "assistant":
        end += 1
    return messages[:end], messages[end:]


def _without_blanks(messages: Messages) -> Messages:
    return [{**message, "content": message["content"].strip()} for message in messages]


def _read_messages(row: Row) -> Sample:
    messages = _messages(row.get("messages"), "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("column `messages` has no assistant turn to learn from")
    return Sample([], (messages,))


def _read_prompt_and_answers(*columns: str) -> Callable[[Row], Sample]:
    """Reads `prompt` and answer columns, as text or as messages, with or without the prompt repeated in them."""

    def read(row: Row) -> Sample:
        if not any(isinstance(row.get(column), list) for column in columns):
            prompt = _text(row, "prompt")
            return Sample(prompt, tuple(_text(row, column).removeprefix(prompt) for column in columns))
        answers = [_answer_messages(row.get(column), column) for column in columns]
        prompt = row.get("prompt")
        if prompt is None:  # answers hold the whole conversation: what they share is the prompt
            shared = 0
            while all(len(answer) > shared + 1 and answer[shared] == answers[0][shared] for answer in answers):
                shared += 1
            prompt = answers[0][:shared]
        else:
            is_text = isinstance(prompt, str)
            prompt = [{"role": "user", "content": prompt}] if is_text else _messages(prompt, "prompt")
        if not prompt:
            raise RowError("there is no prompt: no column `prompt`, and the answers share no first message")
        splits = [_split(prompt, answer, column) for answer, column in zip(answers, columns, strict=True)]
        prompts, answers = zip(*splits, strict=True)
        if any(_without_blanks(prompt) != _without_blanks(prompts[0]) for prompt in prompts):
            raise RowError(f"columns {' and '.join(columns)} do not answer the same prompt")
        return Sample(prompts[0], answers)

    return read


def _read_question(*columns: str) -> Callable[[Row], Sample]:
    """Reads Q&A rows in the wording that the Stack Exchange recipes train on."""

    def read(row: Row) -> Sample:
        prompt = f"Question: {_text(row, 'question')}\n\nAnswer: "
        return Sample(prompt, tuple(_text(row, column) for column in columns))

    return read


def _read_instruction(context: str, answer: str) -> Callable[[Row], Sample]:
    def read(row: Row) -> Sample:
        parts = [f"### Instruction:\n{_text(row, 'instruction')}\n\n"]
        if extra := _text(row, context, may_be_empty=True):
            parts.append(f"### Input:\n{extra}\n\n")
        return Sample("".join(parts) + "### Response:\n", (_text(row, answer),))

    return read


FORMATS = (
    Format("text", ("text",), lambda row: Sample("", (_text(row, "text"),)), '{"text": "Once upon a time"}'),
    Format(
        "prompt-completion",
        ("prompt", "completion"),
        _read_prompt_and_answers("completion"),
        '{"prompt": "2 + 2 =", "completion": " 4"}',
    ),
    Format(
        "messages",
        ("messages",),
        _read_messages,
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
    ),
    Format(
        "instruction",
        ("instruction", "output"),
        _read_instruction("input", "output"),
        '{"instruction": "Add.", "input": "2, 2", "output": "4"}',
    ),
    Format(
        "instruction-response",
        ("instruction", "response"),
        _read_instruction("context", "response"),
        '{"instruction": "Add.", "context": "2, 2", "response": "4"}',
    ),
    Format(
        "question-answer",
        ("question", "answer"),
        _read_question("answer"),
        '{"question": "What is 2 + 2?", "answer": "4"}',
    ),
    Format(
        "question-two-answers",
        ("question", "response_j", "response_k"),
        _read_question("response_j", "response_k"),
        '{"question": "What is 2 + 2?", "response_j": "4", "response_k": "5"}',
        preference=True,
    ),
    Format(
        "preference",
        ("chosen", "rejected"),
        _read_prompt_and_answers("chosen", "rejected"),
        '{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}',
        preference=True,
    ),
)


def recognise(columns: Collection[str], preference: bool, name: str | None = None) -> Format:
    """The format that these columns make; `name` (from --data_format) chooses where several fit.

    Preference tuning takes preference formats alone. Fine-tuning prefers the others and else learns the chosen answer.
    """
    fitting = [format for format in FORMATS if set(format.columns) <= set(columns)]
    fitting = [format for format in fitting if format.preference == preference] or ([] if preference else fitting)
    if name is not None:
        known = {format.name: format for format in FORMATS if format.preference or not preference}
        if name not in known:
            raise InputError(f"--data_format: got {name!r}; choose from {', '.join(known)}")
        if missing := set(known[name].columns) - set(columns):
            raise InputError(
                f"--data_format {name}: column(s) {', '.join(sorted(missing))} missing; found {', '.join(columns)}"
            )
        return known[name]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(columns) or "none"
    if fitting:
        names = " and ".join(format.name for format in fitting)
        raise InputError(f"--dataset_name: the columns {found} fit {names}; choose one with --data_format")
    known = "; ".join(
        f"{' + '.join(format.columns)}, as {format.example}"
        for format in FORMATS
        if format.preference or not preference
    )
    raise InputError(f"--dataset_name: the columns {found} make no known format. Known are: {known}")
