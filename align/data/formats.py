"""Which columns make which format; a row of any of them becomes a prompt and its answers.

Adding a format is adding a row to `FORMATS`.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import cycle
from operator import itemgetter
from typing import Any

from align.errors import InputError

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]
ROLES = ("system", "developer", "user", "assistant", "tool")
PLAIN = {"role", "content"}
SPEAKERS = {role: role for role in (*ROLES, "function_call")} | {  # and other names: ShareGPT's, OpenAI's older ones
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
CONVERSATION = ("system", "tools")  # optional columns of everything that becomes messages
LABELS = ("label", "kto_tag")  # KTO's, whether an answer is good
ONLY_TRUE = "--only_true_labels"
GOOD = ("true", "1", "1.0", "yes", "good", "desirable", "chosen", "accepted", "thumbs_up")
BAD = ("false", "0", "0.0", "-1", "no", "bad", "undesirable", "rejected", "thumbs_down")


class RowError(ValueError):
    """One row cannot be used; the message says why, the caller knows which row it is."""


class LeftOut(RowError):
    """A row that the user asked to leave out."""


@dataclass(frozen=True)
class Sample:
    """A prompt and what may follow it, all as text or all as messages; two answers are chosen and rejected."""

    prompt: str | Messages
    answers: tuple[str, ...] | tuple[Messages, ...]
    tools: list[dict] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """`columns` are needed, `optional` ones are used where they are; `read` gives text, or messages if told so."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row, bool], Sample]
    example: str
    preference: bool = False
    optional: tuple[str, ...] = ()

    @property
    def used(self) -> set[str]:
        return {*self.columns, *self.optional}


# ---------------------------------------------------------------- values


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


def _parse(value: Any) -> Any:
    """A list or an object that stands in a column as JSON: CSV files have only text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _parse_messages(value: Any) -> Any:
    """Messages that stand in a column as JSON; a text that merely happens to be JSON, as a mail, stays a text."""
    parsed = _parse(value)
    messages = parsed if isinstance(parsed, list) else [parsed]
    if messages and all(isinstance(each, Mapping) and _find_speaker(each) in SPEAKERS for each in messages):
        return parsed
    return value


def _find_speaker(message: Mapping) -> str:
    return str(message.get("role", message.get("from"))).lower()


def without_nones(value: Any) -> Any:
    """What Arrow holds, without the nulls with which it gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_nones(each) for key, each in value.items() if each is not None}
    return [without_nones(each) for each in value] if isinstance(value, list) else value


def _join_parts(content: Any, where: str) -> Any:
    """Content that is a list of parts, as text."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text", part.get("value")) if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(text, str):
            texts.append(text)
        elif isinstance(part, str):
            texts.append(part)
        else:
            kind = part.get("type") if isinstance(part, Mapping) else None
            what = _describe(part) if kind in (None, "text") else repr(kind)
            raise RowError(f"{where} has a part that is not text but {what}")
    return "\n".join(texts)


def _message(message: Any, where: str) -> dict[str, Any]:
    """One message in Hugging Face's terms: `role`, `content`, and further keys as they are."""
    if (
        type(message) is dict
        and message.keys() == PLAIN
        and message["role"] in ROLES
        and type(message["content"]) is str
    ):
        return message  # as most are
    if not isinstance(message, Mapping):
        raise RowError(f"{where} is {_describe(message)}, not role and content")
    made = {key: value for key, value in message.items() if value is not None and value != []}
    for old, new in (("from", "role"), ("value", "content"), ("loss_weight", "weight")):
        if old in made:
            if isinstance(made.get(new), str) and not isinstance(made[old], str):
                continue  # a key of its own, as a score
            value = made.pop(old)
            if _name_role(made.setdefault(new, value)) != _name_role(value):
                raise RowError(f"{where}: `{old}` and `{new}` say two different things")
    if not isinstance(made.get("role"), str):
        raise RowError(f"{where}: `role` is {_describe(made.get('role'))}")
    role = made["role"].lower()
    made["content"] = _join_parts(made.get("content"), where)
    if role == "function_call":  # ShareGPT of LLaMA-Factory: the call stands as JSON in the content
        calls = _parse(made["content"])
        calls = calls if isinstance(calls, list) else [calls]
        if not all(isinstance(call, Mapping) and "name" in call for call in calls):
            raise RowError(f"{where}: {_describe(made['content'])} is not a call of a named function")
        made["tool_calls"] = [{"type": "function", "function": dict(call)} for call in calls]
        role, made["content"] = "assistant", None
    if isinstance(made.get("function_call"), Mapping) and "tool_calls" not in made:  # OpenAI's older name of one call
        made["tool_calls"] = [{"type": "function", "function": dict(made.pop("function_call"))}]
    made["role"] = SPEAKERS.get(role, role)
    if made["role"] not in ROLES:
        raise RowError(f"{where}: role {made['role']!r} is none of {ROLES}")
    if not isinstance(made["content"], str):
        says_otherwise = made["role"] == "assistant" and ("tool_calls" in made or "reasoning_content" in made)
        if made["content"] is not None or not says_otherwise:
            raise RowError(f"{where}: `content` is {_describe(made['content'])}")
    if not isinstance(made.get("reasoning_content", ""), str):
        raise RowError(f"{where}: `reasoning_content` is {_describe(made['reasoning_content'])}, not text")
    if isinstance(made.get("weight"), str):
        with suppress(ValueError):  # the next line names what is no number
            made["weight"] = float(made["weight"])
    if "weight" in made and made["weight"] not in (0, 1):
        raise RowError(f"{where}: `weight` is {_describe(made['weight'])}; 0 is not learnt, 1 is, and nothing between")
    if "train" in made:
        learnt = read_truth(made["train"])
        if learnt is None:
            raise RowError(f"{where}: `train` is {_describe(made['train'])}, neither true nor false")
        del made["train"]
        if made.setdefault("weight", int(learnt)) != learnt:
            raise RowError(f"{where}: `train` and `weight` say two different things")
    if "tool_calls" in made:
        made["tool_calls"] = _read_calls(made["tool_calls"], where)
    return made


def _name_role(value: Any) -> Any:
    return SPEAKERS.get(value.lower(), value) if isinstance(value, str) else value


def _read_calls(calls: Any, where: str) -> list[dict]:
    """Calls of functions, with their arguments as an object, as most templates want them."""
    calls = _parse(calls)
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = {key: value for key, value in call.items() if value is not None} if isinstance(call, Mapping) else call
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: `tool_calls` holds {_describe(call)}, not a call of a named function")
        function = {**function, **({"arguments": _parse(function["arguments"])} if "arguments" in function else {})}
        made.append({**call, "function": function} if "function" in call else function)
    return made


def is_learnt(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _messages(value: Any, column: str) -> Messages:
    """Checked messages: system first if at all, users and assistants in turn."""
    value = _parse_messages(value)
    if isinstance(value, Mapping) and {"role", "from"} & value.keys():
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"column `{column}` is {_describe(value)}, not a list of messages")
    if not value:
        raise RowError(f"column `{column}` is empty, not a list of messages")
    messages = [_message(message, f"column `{column}`, message {number}") for number, message in enumerate(value, 1)]
    roles = [message["role"] for message in messages]
    for number, (before, role) in enumerate(zip([None, *roles], roles, strict=False), 1):
        if not _may_follow(role, before):
            raise RowError(f"column `{column}`, message {number}: role {role!r} after {before!r} is out of order")
    return messages


def _may_follow(role: str, before: str | None) -> bool:
    is_first = role in ("system", "developer")
    return before is None or (not is_first and (role != before or role == "tool"))


def _with_system(row: Row, messages: Messages) -> Messages:
    """The column `system` as the first message."""
    system = _text(row, "system", may_be_empty=True)
    if not system.strip():
        return messages
    if messages and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"].strip() == system.strip():
            return messages
        raise RowError("the column `system` and the first message hold two different system prompts")
    return [{"role": "system", "content": system}, *messages]


def _tools(row: Row) -> list[dict] | None:
    tools = _parse(row.get("tools"))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"column `tools` is {_describe(tools)}, not a list of functions as JSON schemas")
    return list(tools)


def _history(row: Row) -> list[tuple[str, str]]:
    """LLaMA-Factory's column `history`: earlier questions with their answers."""
    turns = _parse(row.get("history")) or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(each, str) for each in turn)
        for turn in turns
    ):
        raise RowError(f"column `history` is {_describe(turns)}, not a list of pairs of question and answer")
    return [tuple(turn) for turn in turns]


# ---------------------------------------------------------------- rows of messages


def _read_chat(column: str) -> Callable[[Row, bool], Sample]:
    def read(row: Row, as_chat: bool = False) -> Sample:
        value, notes = _give_roles(row.get(column))
        messages = _with_system(row, _messages(value, column))
        if not any(message["role"] == "assistant" for message in messages):
            raise RowError(f"column `{column}` has no assistant turn to learn from")
        return Sample([], (messages,), _tools(row), notes)

    return read


WITHOUT_ROLES = "texts without a role are taken for turns of user and assistant, the user first"


def _give_roles(value: Any) -> tuple[Any, tuple[str, ...]]:
    """Texts without a role, as LIMA and UltraChat have them, as messages; other values as they are. And a note."""
    value = _parse(value)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        parsed = [_parse_messages(each) for each in value]  # each may be a message as JSON
        if not any(isinstance(each, str) for each in parsed):
            return parsed, ()
        roles = zip(cycle(("user", "assistant")), value, strict=False)
        return [{"role": role, "content": text} for role, text in roles], (WITHOUT_ROLES,)
    return value, ()


def _read_chat_pair(row: Row, as_chat: bool = False) -> Sample:
    """LLaMA-Factory's pairs: a conversation, and two messages of which either may follow it."""
    prompt = _with_system(row, _messages(row.get("conversations"), "conversations"))
    answers = tuple(_answer_messages(row.get(column), column) for column in ("chosen", "rejected"))
    splits = [_split(prompt, answer, column) for answer, column in zip(answers, ("chosen", "rejected"), strict=True)]
    return _pair(splits, ("chosen", "rejected"), _tools(row))


def _answer_messages(value: Any, column: str) -> Messages:
    messages = _messages(value, column)
    last = messages[-1]
    if last["role"] != "assistant" or not ((last["content"] or "").strip() or last.get("tool_calls")):
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
        told = [message for message in prompt if message["role"] not in ("system", "developer")]
        if told != prompt and told and _without_blanks(answer[: len(told)]) == _without_blanks(told):
            messages, end = prompt + answer[len(told) :], len(prompt)  # all of it but the system prompt
            break
    if end == len(messages):
        raise RowError(f"column `{column}` has no answer behind the prompt")
    before, role = messages[end - 1]["role"] if end else None, messages[end]["role"]
    if not _may_follow(role, before):
        raise RowError(f"column `{column}` neither repeats nor follows the prompt: role {role!r} after {before!r}")
    while messages[end]["role"] != "assistant":
        end += 1
    return messages[:end], messages[end:]


def _without_blanks(messages: Messages) -> Messages:
    return [{**message, "content": (message["content"] or "").strip()} for message in messages]


def _pair(splits: list[tuple[Messages, Messages]], columns: tuple[str, ...], tools: list | None) -> Sample:
    prompts, answers = zip(*splits, strict=True)
    if any(_without_blanks(prompt) != _without_blanks(prompts[0]) for prompt in prompts):
        raise RowError(f"columns {' and '.join(columns)} do not answer the same prompt")
    return Sample(prompts[0], answers, tools)


def _read_prompt_and_answers(*columns: str) -> Callable[[Row, bool], Sample]:
    """Reads `prompt` and answer columns, as text or as messages, with or without the prompt repeated in them."""

    def read(row: Row, as_chat: bool = False) -> Sample:
        values = [_parse_messages(row.get(column)) for column in columns]
        for value, column in zip(values, columns, strict=True):
            if not isinstance(value, str | list | Mapping):
                raise RowError(f"column `{column}` is {_describe(value)}, neither text nor messages")
        if all(isinstance(value, str) for value in values):
            prompt = _parse_messages(row.get("prompt"))
            if prompt is None and all(map(_is_transcript, values)):
                return _read_transcripts(row, values, columns, as_chat)
            if isinstance(prompt, str) and _is_transcript(prompt):
                return _read_transcripts(row, [_behind(prompt, value) for value in values], columns, as_chat)
            if not isinstance(prompt, list | Mapping):
                return _read_texts(row, columns, as_chat)
            values = [[{"role": "assistant", "content": _text(row, column)}] for column in columns]
        answers = [_answer_messages(value, column) for value, column in zip(values, columns, strict=True)]
        prompt = row.get("prompt")
        if prompt is None:  # answers hold the whole conversation: what they share is the prompt
            shared = 0
            while all(len(answer) > shared + 1 and answer[shared] == answers[0][shared] for answer in answers):
                shared += 1
            if len(answers) == 1:
                shared = next(number for number, each in enumerate(answers[0]) if each["role"] == "assistant")
            prompt = answers[0][:shared]
        else:
            is_text = isinstance(_parse_messages(prompt), str)
            prompt = [{"role": "user", "content": prompt}] if is_text else _messages(prompt, "prompt")
        if not prompt:
            raise RowError("there is no prompt: no column `prompt`, and the answers share no first message")
        splits = [_split(prompt, answer, column) for answer, column in zip(answers, columns, strict=True)]
        splits = [(_with_system(row, before), answer) for before, answer in splits]
        return _pair(splits, columns, _tools(row))

    return read


# ---------------------------------------------------------------- rows of text


def _chat(system: str, history: Iterable[tuple[str, str]], asked: str, answers: Iterable[str], row: Row) -> Sample:
    """Texts as turns of a chat; a single answer is learnt together with those in its history."""
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages.append({"role": "user", "content": asked})
    said = [[{"role": "assistant", "content": _without_joint(answer)}] for answer in answers]
    if len(said) > 1:
        return Sample(messages, tuple(said), _tools(row))
    messages += said[0]
    first = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
    return Sample(messages[:first], (messages[first:],), _tools(row))


def _without_joint(answer: str) -> str:
    """An answer without the blank or line that joins it to a prompt; the indent of its first line stays."""
    answer = answer.strip("\n\r\t").rstrip()
    return answer[1:] if answer[:1] == " " and answer[1:2] != " " else answer


def _before(row: Row) -> str:
    """What stands in front of a prompt of text."""
    if _tools(row):
        raise RowError("the column `tools` needs a chat template: add --text_as_chat, and --chat_template if needed")
    system = _text(row, "system", may_be_empty=True)
    return f"{system.strip()}\n\n" if system.strip() else ""


def _read_texts(row: Row, columns: tuple[str, ...], as_chat: bool) -> Sample:
    if "prompt" not in row:
        other = next((name for name in ALIASES["prompt"] if name in row), "YOUR_COLUMN")
        raise RowError(f"there is no column `prompt`: name the one that holds it with --columns prompt={other}")
    prompt, answers = _text(row, "prompt"), [_text(row, column) for column in columns]
    notes: tuple[str, ...] = ()
    if len(prompt.split()) > 1 and all(_repeats(prompt, answer) for answer in answers):
        answers = [answer[len(prompt) :] for answer in answers]
        notes = ("the prompt, which the answers repeat, counts once",)
    if as_chat:
        sample = _chat(_text(row, "system", may_be_empty=True), (), prompt, answers, row)
        return replace(sample, notes=notes)
    return Sample(_before(row) + prompt, tuple(answers), notes=notes)


def _repeats(prompt: str, answer: str) -> bool:
    """Whether the answer goes on behind the prompt, with a word of its own."""
    rest = answer[len(prompt) :]
    return answer.startswith(prompt) and bool(rest.strip()) and not (prompt[-1].isalnum() and rest[0].isalnum())


HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPOKEN = re.compile(r"\n\n(Human|Assistant):")


def _is_transcript(text: str) -> bool:
    """Whether it is a conversation in the wording of hh-rlhf."""
    text = "\n\n" + text.lstrip()
    return text.startswith(HUMAN) and ASSISTANT in text


def _behind(prompt: str, answer: str) -> str:
    return answer if answer.startswith(prompt) else prompt + answer


def _read_transcripts(row: Row, texts: list[str], columns: tuple[str, ...], as_chat: bool) -> Sample:
    """hh-rlhf: all but the last answer is the prompt."""
    prompts, answers = zip(*(("\n\n" + text.lstrip()).rsplit(ASSISTANT, 1) for text in texts), strict=True)
    if any(prompt != prompts[0] for prompt in prompts):
        raise RowError(f"columns {' and '.join(columns)} do not answer the same prompt")
    for answer, column in zip(answers, columns, strict=True):
        if not answer.strip():
            raise RowError(f"column `{column}` ends without an answer")
        if HUMAN in answer:
            raise RowError(f"column `{column}` does not end with an answer of the assistant")
    if not as_chat:
        return Sample(_before(row) + prompts[0] + ASSISTANT, answers)
    _, *parts = SPOKEN.split(prompts[0])
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    prompt = _with_system(row, _messages(turns, columns[0]))
    said = tuple([{"role": "assistant", "content": _without_joint(answer)}] for answer in answers)
    return Sample(prompt, said, _tools(row))


def _read_question(*columns: str) -> Callable[[Row, bool], Sample]:
    """Reads Q&A rows, as text in the wording that the Stack Exchange recipes train on."""

    def read(row: Row, as_chat: bool = False) -> Sample:
        question, listed = _text(row, "question"), [_list_answers(row, column) for column in columns]
        answers = [_text({column: each[0]}, column) for column, each in zip(columns, listed, strict=True)]
        notes = ("of several answers the first is used",) if any(set(each) != {each[0]} for each in listed) else ()
        context = _text(row, "context", may_be_empty=True).strip()
        if as_chat:
            asked = f"{context}\n\n{question}" if context else question
            return replace(_chat(_text(row, "system", may_be_empty=True), (), asked, answers, row), notes=notes)
        context = f"Context: {context}\n\n" if context else ""
        return Sample(f"{_before(row)}{context}Question: {question}\n\nAnswer: ", tuple(answers), notes=notes)

    return read


def _list_answers(row: Row, column: str) -> list:
    """The texts of an answer: SQuAD has a list of equally good ones."""
    value = row.get(column) if column != "answers" else _parse(row.get(column))
    if isinstance(value, Mapping) and "text" in value:
        value = value["text"]
    if column != "answers" or not isinstance(value, list):
        return [value]
    if not value:
        raise RowError(f"column `{column}` holds no answer")
    return [value[0], *map(str, value[1:])]


def _read_instruction(*answers: str) -> Callable[[Row, bool], Sample]:
    def read(row: Row, as_chat: bool = False) -> Sample:
        instruction = _text(row, "instruction")
        extras = [_text(row, column, may_be_empty=True) for column in ("input", "context")]
        extra = "\n\n".join(each for each in extras if each.strip())
        said = [_text(row, answer) for answer in answers]
        if as_chat:
            asked = f"{instruction}\n\n{extra}" if extra.strip() else instruction
            return _chat(_text(row, "system", may_be_empty=True), _history(row), asked, said, row)
        parts = [_before(row)]
        parts += [f"### Instruction:\n{old}\n\n### Response:\n{answer}\n\n" for old, answer in _history(row)]
        notes = ("the answers in `history` are shown, but not learnt",) if len(parts) > 1 else ()
        parts.append(f"### Instruction:\n{instruction}\n\n")
        if extra.strip():
            parts.append(f"### Input:\n{extra}\n\n")
        return Sample("".join(parts) + "### Response:\n", tuple(said), notes=notes)

    return read


def _read_completions(preference: bool) -> Callable[[Row, bool], Sample]:
    """UltraFeedback: several answers with scores; the best one is chosen, the worst rejected."""

    def read(row: Row, as_chat: bool = False) -> Sample:
        rated = _parse(row.get("completions"))
        if not isinstance(rated, list) or not rated:
            raise RowError(f"column `completions` is {_describe(rated or None)}, not a list of answers with scores")
        scored = [(each.get("overall_score"), each.get("response")) for each in rated if isinstance(each, Mapping)]
        scored = [(score, said) for score, said in scored if isinstance(said, str) and _is_number(score)]
        if len(scored) < 1 + preference:
            raise RowError("column `completions` has too few answers with a `response` and a number as `overall_score`")
        scored.sort(key=itemgetter(0), reverse=True)
        if preference and scored[0][0] == scored[-1][0]:
            raise RowError("all `completions` have the same `overall_score`: none is better")
        answers = {"completion": scored[0][1], "chosen": scored[0][1], "rejected": scored[-1][1]}
        columns = ("chosen", "rejected") if preference else ("completion",)
        sample = _read_texts({**row, "prompt": row.get("instruction"), **answers}, columns, as_chat)
        used = "best and the worst are" if preference else "best is"
        notes = [f"of several `completions` the {used} used, by `overall_score`"] if len(rated) > len(columns) else []
        keys = {key for each in rated if isinstance(each, Mapping) for key in each} - {"response", "overall_score"}
        if keys:
            notes.append(f"keys of `completions` that are not used: {', '.join(sorted(keys))}")
        return replace(sample, notes=(*sample.notes, *notes))

    return read


def _is_number(score: Any) -> bool:
    return isinstance(score, int | float) and math.isfinite(score)


def _read_text(row: Row, as_chat: bool = False) -> Sample:
    return Sample("", (_text(row, "text"),))


FORMATS = (
    Format("text", ("text",), _read_text, '{"text": "Once upon a time"}'),
    Format(
        "prompt-completion",
        ("prompt", "completion"),
        _read_prompt_and_answers("completion"),
        '{"prompt": "2 + 2 =", "completion": " 4"}',
        optional=(*CONVERSATION, *LABELS),
    ),
    Format(
        "messages",
        ("messages",),
        _read_chat("messages"),
        '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}',
        optional=(*CONVERSATION, *LABELS),
    ),
    Format(
        "conversations",
        ("conversations",),
        _read_chat("conversations"),
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}',
        optional=(*CONVERSATION, *LABELS),
    ),
    Format(
        "instruction",
        ("instruction", "output"),
        _read_instruction("output"),
        '{"instruction": "Add.", "input": "2, 2", "output": "4"}',
        optional=("input", "context", "history", *CONVERSATION, *LABELS),
    ),
    Format(
        "instruction-response",
        ("instruction", "response"),
        _read_instruction("response"),
        '{"instruction": "Add.", "context": "2, 2", "response": "4"}',
        optional=("input", "context", "history", *CONVERSATION, *LABELS),
    ),
    Format(
        "question-answer",
        ("question", "answer"),
        _read_question("answer"),
        '{"question": "What is 2 + 2?", "answer": "4"}',
        optional=("context", *CONVERSATION, *LABELS),
    ),
    Format(
        "question-answers",
        ("question", "answers"),
        _read_question("answers"),
        '{"context": "Two and two make four.", "question": "What is 2 + 2?", "answers": {"text": ["four"]}}',
        optional=("context", *CONVERSATION),
    ),
    Format(
        "question-two-answers",
        ("question", "response_j", "response_k"),
        _read_question("response_j", "response_k"),
        '{"question": "What is 2 + 2?", "response_j": "4", "response_k": "5"}',
        preference=True,
        optional=("context", *CONVERSATION),
    ),
    Format(
        "question-pair",
        ("question", "chosen", "rejected"),
        _read_question("chosen", "rejected"),
        '{"system": "Be brief.", "question": "What is 2 + 2?", "chosen": "4", "rejected": "Five."}',
        preference=True,
        optional=("context", *CONVERSATION),
    ),
    Format(
        "instruction-pair",
        ("instruction", "chosen", "rejected"),
        _read_instruction("chosen", "rejected"),
        '{"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"}',
        preference=True,
        optional=("input", "context", "history", *CONVERSATION),
    ),
    Format(
        "conversations-pair",
        ("conversations", "chosen", "rejected"),
        _read_chat_pair,
        '{"conversations": [{"from": "human", "value": "2 + 2?"}], "chosen": {"from": "gpt", "value": "4"}, '
        '"rejected": {"from": "gpt", "value": "5"}}',
        preference=True,
        optional=CONVERSATION,
    ),
    Format(
        "completions",
        ("instruction", "completions"),
        _read_completions(preference=False),
        '{"instruction": "Add 2 and 2.", "completions": [{"response": "4", "overall_score": 9}]}',
        optional=CONVERSATION,
    ),
    Format(
        "completions-pair",
        ("instruction", "completions"),
        _read_completions(preference=True),
        '{"instruction": "Add 2 and 2.", "completions": [{"response": "4", "overall_score": 9}, '
        '{"response": "5", "overall_score": 1}]}',
        preference=True,
        optional=CONVERSATION,
    ),
    Format(
        "preference",
        ("chosen", "rejected"),
        _read_prompt_and_answers("chosen", "rejected"),
        '{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}',
        preference=True,
        optional=("prompt", *CONVERSATION),
    ),
)


# ---------------------------------------------------------------- recognising


def recognise(columns: Collection[str], preference: bool, name: str | None = None) -> Format:
    """The format that these columns make; `name` (from --data_format) chooses where several fit.

    Preference tuning takes preference formats alone. Fine-tuning prefers the others; of a preference format it learns
    the chosen answer. A format whose columns are some of another's gives way to it.
    """
    known = {format.name: format for format in FORMATS if format.preference or not preference}
    if name is not None:
        if name not in known:
            raise InputError(f"--data_format: got {name!r}; choose from {', '.join(known)}")
        if missing := set(known[name].columns) - set(columns):
            raise InputError(
                f"--data_format {name}: column(s) {', '.join(sorted(missing))} missing; found {', '.join(columns)}"
            )
        return known[name]
    fitting = [format for format in known.values() if set(format.columns) <= set(columns)]
    fitting = [format for format in fitting if not any(_is_part_of(format, other, columns) for other in fitting)]
    fitting = [format for format in fitting if format.preference == preference] or fitting
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(columns) or "none"
    if fitting:
        names = " and ".join(format.name for format in fitting)
        raise InputError(f"--dataset_name: the columns {found} fit {names}; choose one with --data_format")
    singles = [format for format in FORMATS if not format.preference and set(format.columns) <= set(columns)]
    if preference and singles and any(column in columns for column in LABELS):
        raise InputError(
            f"--dataset_name: the columns {found} are single answers with a label, as KTO takes them, and no pairs; "
            f"sft.py {ONLY_TRUE} trains on the true ones alone"
        )
    if preference and singles and not set(columns).intersection(("rejected", *ALIASES["rejected"])):
        raise InputError(
            f"--dataset_name: the columns {found} are {singles[0].name} rows, which have one answer each; preferences "
            f"need a better and a worse one, as {known['preference'].example}; sft.py trains on single answers"
        )
    examples = "; ".join(f"{' + '.join(format.columns)}, as {format.example}" for format in known.values())
    raise InputError(
        f"--dataset_name: the columns {found} make no known format. {_suggest(columns, list(known.values()))}. "
        f"Known are: {examples}"
    )


def _is_part_of(format: Format, other: Format, columns: Collection[str]) -> bool:
    return set(format.columns) < set(other.columns) and format.used.intersection(columns) <= other.used


ALIASES = {
    "prompt": ("question", "instruction", "input", "query", "problem", "ask", "user", "source"),
    "question": ("prompt", "query", "problem", "input", "ask"),
    "instruction": ("prompt", "question", "query", "task"),
    "completion": ("answer", "response", "output", "reply", "target", "solution", "assistant"),
    "answer": ("response", "output", "reply", "completion", "solution", "target"),
    "output": ("response", "answer", "reply", "completion", "target", "solution"),
    "response": ("output", "answer", "reply", "completion", "target", "solution"),
    "chosen": (
        "good",
        "better",
        "preferred",
        "accepted",
        "winner",
        "positive",
        "best",
        "response_j",
        "win",
    ),
    "rejected": (
        "bad",
        "worse",
        "dispreferred",
        "refused",
        "loser",
        "negative",
        "worst",
        "response_k",
        "lose",
    ),
    "text": ("content", "document", "body", "story", "passage"),
    "messages": ("conversation", "conversations", "chat", "dialog", "dialogue", "turns", "data"),
    "conversations": ("conversation", "messages", "chat", "dialog", "dialogue", "turns"),
}


def _suggest(columns: Collection[str], formats: list[Format]) -> str:
    """The format that is nearest, and the --columns that would make it fit."""

    def rename(format: Format) -> dict[str, str]:
        free, found = [column for column in columns if column not in format.columns], {}
        for wanted in (column for column in format.columns if column not in columns):
            lower = {column.lower(): column for column in free if column not in found.values()}
            names = (wanted, *ALIASES.get(wanted, ()))
            match = next((lower[name] for name in names if name in lower), None)
            if match is None:
                near = next((close for name in names if (close := get_close_matches(name, lower, 1, 0.75))), None)
                parts = [column for column in lower for name in names if name in re.split(r"[^a-z]+", column)]
                match = lower[near[0]] if near else lower[parts[0]] if parts else None
            if match is not None:
                found[wanted] = match
        return found

    def distance(format: Format) -> tuple[int, int]:
        missing = set(format.columns) - set(columns)
        return len(missing - rename(format).keys()), len(missing)

    nearest = min(formats, key=lambda format: (*distance(format), -len(format.columns)))
    missing, renamed = [column for column in nearest.columns if column not in columns], rename(nearest)
    flags = ",".join(f"{column}={renamed.get(column, 'YOUR_COLUMN')}" for column in missing)
    return f"The nearest is {nearest.name} ({' + '.join(nearest.columns)}): --columns {flags}"


def read_truth(value: Any) -> bool | None:
    """What a label says of an answer; None where it says something else, as the name of a class."""
    word = str(value).strip().lower()
    return True if word in GOOD else False if word in BAD else None


def find_label(row: Row, format: Format) -> str | None:
    """The column that says whether the row's answer is good, as in KTO's data."""
    columns = (column for column in LABELS if column in format.optional)
    return next((column for column in columns if read_truth(row.get(column)) is not None), None)


def read_label(row: Row, format: Format, only_true: bool) -> None:
    """Learning all of KTO's rows would teach the bad answers as well."""
    column = find_label(row, format)
    if column is None:
        given = next((name for name in LABELS if name in row), None)
        if only_true and given:
            raise RowError(f"column `{given}` is {_describe(row[given])}, neither true nor false")
    elif not only_true:
        raise RowError(
            f"column `{column}` says which answers are good and which are bad (KTO), and fine-tuning would learn both; "
            f"{ONLY_TRUE} trains on the true ones alone, and --columns other={column} leaves the column unused"
        )
    elif not read_truth(row[column]):
        raise LeftOut(f"`{column}` is false")
