"""Where in a chat's text the model speaks, for any template: found by comparing what the template writes.

A turn begins where the generation prompt for the messages before it ends, right behind what the model is asked with. It
ends with the first special token behind what is said. Plain chats of the same roles are rendered once each: the first
ones show what the template writes around their turns.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from align.data.formats import PLAIN, LeftOut, Messages, RowError, is_learnt
from align.errors import InputError

MARK = "\ue000\ue001"
MARKED_THOUGHTS = re.compile(r"[<\[|:_/]think|THINK")  # of any model: templates treat what stands between such marks
THOUGHTS = re.compile(r"</?think(?:ing)?>")
NOT_SHOWN = "the chat template does not show"  # begins each note about something that the model never sees
APART = "turns of the assistant that the chat template changes once others follow become samples of their own"
SURELY = 20  # a text of so many characters does not stand in a chat by coincidence
ALIKE = 3  # chats of the same roles that are compared before the others are rendered once


@dataclass(frozen=True)
class Rendering:
    """What is asked and what follows, as the model reads them; `spans` are the characters of `answer` to learn."""

    prompt: str
    answer: str
    spans: tuple[tuple[int, int], ...]
    chat: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turn:
    """A message as it is said behind what is asked with: `said` is learnt, down to the `closing` token."""

    asked: str
    said: str
    closing: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What a template writes around each learnt turn of all chats with the same roles.

    `openings` stand between the message before and the turn, `leads` between that and the content, `closings` behind.
    """

    openings: tuple[str, ...]
    leads: tuple[str, ...]
    closings: tuple[str, ...]
    counts: tuple[int, ...]  # of each opening in the whole text


class ChatTemplate:
    """A tokenizer's chat template, and what it has shown about itself so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.source = tokenizer.chat_template
        self.wants_parts = wants_parts(tokenizer)
        self.writes_date = "strftime_now" in str(self.source)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        if tokenizer.bos_token != tokenizer.eos_token:
            special.discard(tokenizer.bos_token)
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.variables = {**tokenizer.special_tokens_map, "tools": None, "documents": None}
        self.shapes: dict[tuple, list[Shape | None]] = {}
        self.shown: Counter[tuple] = Counter()  # how often a key of messages with the same keys changed the text

    def render(self, prompt: Messages, answer: Messages, tools: list | None = None) -> list[Rendering]:
        """The chat as one text, with spans on the assistant's turns in `answer`.

        A turn that this text shows otherwise than it is asked for has a text of its own.
        """
        messages = prompt + answer
        turns = [number for number in range(len(prompt), len(messages)) if is_learnt(messages[number])]
        if not turns:
            raise LeftOut("every turn of the assistant has the weight 0")
        if tools is not None or not all(map(_is_plain, messages)):
            return self._compare(messages, turns, tools)[0]
        key = (len(prompt), *(message["role"] for message in messages))
        seen = self.shapes.setdefault(key, [])
        if len(seen) >= ALIKE and seen[0] is not None and all(shape == seen[0] for shape in seen):
            rendering = self._follow(seen[0], messages, turns)
            if rendering is not None:
                return [rendering]
        renderings, shape = self._compare(messages, turns, None)
        if len(seen) < ALIKE:
            seen.append(shape)
        return renderings

    def find_end(self) -> str | None:
        """The special token that ends a turn of the assistant; None where a turn ends without one."""
        try:
            closing = self._find_frame([{"role": "user", "content": "Hello"}], None)[1]
        except RowError:
            return None
        special = self.special.search(closing)
        return special[0] if special else None

    # Writing

    def write(self, messages: Messages, tools: list | None = None, ask: bool = False) -> str:
        """The chat's text; `ask` puts the generation prompt at its end."""
        if not self.source:
            raise InputError("--chat_template: the tokenizer has none for chats; name a file, or plain")
        try:
            text = self._apply(messages, tools, ask)
            if any(message["content"] is None for message in messages) and "None" in text:
                text = self._apply(_without_none(messages), tools, ask)
            if written := _find_written_by_python(messages, text):
                as_json = self._apply(_with_arguments_as_text(messages), tools, ask)
                return as_json if any(as_json.count(each) < text.count(each) for each in written) else text
            return text
        except Exception as error:  # jinja2 errors and whatever a template raises on its own
            reason = error
            for change in (_without_none, _with_arguments_as_text):
                try:
                    return self._apply(change(messages), tools, ask)
                except Exception as other:  # of a chat without None: the reason that is not about None
                    reason = other if change is _without_none else reason
            raise RowError(f"the chat template refuses it: {' '.join(str(reason).split())}") from error

    def _apply(self, messages: Messages, tools: list | None, ask: bool) -> str:
        knows_developer = "developer" in str(self.source)
        shown = []
        for message in messages:
            if "weight" in message:
                message = {key: value for key, value in message.items() if key != "weight"}
            if message["role"] == "developer" and not knows_developer:
                message = {**message, "role": "system"}
            shown.append(message)
        shown = with_parts(shown) if self.wants_parts else shown
        if tools is not None or not isinstance(self.source, str):  # the tokenizer may have another template for tools
            options = {"tools": tools, "add_generation_prompt": ask, "tokenize": False}
            return self.tokenizer.apply_chat_template(shown, **options)
        # The same, without looking up the tokenizer's special tokens for each chat: that takes longer than the template
        template = _compile_jinja_template(self.source)
        return template.render(messages=shown, add_generation_prompt=ask, **self.variables)

    # Comparing

    def _compare(
        self, messages: Messages, turns: list[int], tools: list | None
    ) -> tuple[list[Rendering], Shape | None]:
        """Finds the spans of any chat: how each turn is asked for and said, and where that stands in the whole text."""
        text, notes = self.write(messages, tools), []
        found, others = [], []  # turns that the whole text shows as asked for, and those that it shows otherwise
        for number in turns:
            turn: Any = self._read_turn(messages[: number + 1], tools)
            if not turn.said.strip():
                notes.append("a turn of the assistant that the chat template shows as nothing is not learnt")
                continue
            notes += turn.notes
            if not text.startswith(turn.asked + turn.said):
                inner = self._read_inner_turn(messages, number, tools, text, turn) if number != turns[-1] else None
                if inner is None:
                    others.append((number, turn))
                    continue
                turn = inner
            found.append((number, turn))
        if not found and not others:
            raise RowError("the chat template shows no turn of the assistant to learn from")
        if len(others) + bool(found) > 1:
            notes.append(APART)
        if messages[-1]["role"] != "assistant":
            notes.append("what follows the last turn of the assistant is not used")
        shown = "".join([text, *(turn.asked for _, turn in others)])
        unseen = self._find_unseen(messages, tools, text, shown, [number for number, _ in others])
        notes = list(dict.fromkeys([*notes, *unseen]))
        spans = [(len(turn.asked), len(turn.asked) + len(turn.said)) for _, turn in found]
        renderings = [_cut(text, spans)] if found else []
        renderings += [Rendering(turn.asked, turn.said, ((0, len(turn.said)),)) for _, turn in others]
        renderings[0] = replace(renderings[0], notes=tuple(notes))
        is_plain = tools is None and not notes and all(map(_is_plain, messages)) and len(found) == len(turns)
        return renderings, _find_shape(messages, found, text) if is_plain else None

    def _read_turn(self, messages: Messages, tools: list | None) -> Turn:
        """The last message, right behind what it is asked for with."""
        before, message = messages[:-1], messages[-1]
        text = self.write(messages, tools)
        opened, closing = self._find_frame(before, tools)
        if not text.endswith(closing):  # as calls that end with a token of their own
            last = max(self.special.finditer(text), key=lambda found: found.end(), default=None)
            closing = text[last.start() :] if last and not text[last.end() :].strip() else ""
        end = len(text) - len(closing)
        special = self.special.search(closing)
        closing = closing[: special.end()] if special else closing.rstrip()
        try:
            asked = self.write(before, tools, ask=True)
        except RowError:
            if before:
                raise
            asked = opened  # nothing can be asked for before the first message
        content, thoughts = message["content"] or "", message.get("reasoning_content") or ""
        notes: tuple[str, ...] = ()
        said: str | None
        owed: str | None
        calls = message.get("tool_calls")
        without = {key: value for key, value in message.items() if key != "tool_calls"}
        has_calls = bool(calls) and not self._shows_the_same(text, [*before, without], tools)
        if not content.strip() and not has_calls and (calls or not thoughts.strip()):
            return Turn(asked, "", closing)
        whole = f"<think>\n{thoughts.strip()}\n</think>\n\n{content}" if thoughts.strip() else content
        if text.startswith(asked):
            said = text[len(asked) : end]
        else:
            if not text.startswith(opened):
                opened = opened.rstrip()  # a blank in front of what is said, and not of a call
            said, owed = text[len(opened) : end] if text.startswith(opened) else None, ""
            asked_tail, opened_tail = _behind_last(before, asked), _behind_last(before, opened)
            more = _rest_behind(opened_tail, asked_tail)
            if said is not None and more is not None:
                blanks = asked_tail[len(asked_tail.rstrip()) :]
                said = (more + said).removeprefix(blanks) if not more.strip() else more + said
            else:
                owed = asked_tail[len(opened_tail) :] if asked_tail.startswith(opened_tail) else None
                if owed and whole.lstrip().startswith(owed.strip()):  # as <think> at the end of a generation prompt
                    said = whole.lstrip()[len(owed.strip()) :]
                    said = said.removeprefix(owed[len(owed.rstrip()) :])
                    whole = said
                elif owed and said is not None and owed.count("<think>") == owed.count("</think>"):
                    pass  # asked with more than the template shows, as an empty block of thoughts: learnt behind it
                else:
                    asks, shows = asked_tail.lstrip()[-40:], opened_tail.lstrip()[-40:]
                    notes = (f"asked with …{asks!r}, but shown by the chat template behind …{shows!r}",)
                    if said is None:
                        raise RowError("the chat template does not show the answer behind what is asked; " + notes[0])
                    asked = opened
        parts = [part.strip() for part in THOUGHTS.split(whole)]
        if not has_calls and not all(part in said for part in parts):
            if parts[-1] not in said:
                if said.strip():
                    raise RowError(f"the chat template does not show message {len(messages)} as it is")
            elif THOUGHTS.search(str(self.source)):
                said, notes = whole, (*notes, "thoughts that the chat template leaves out are learnt as they were said")
            else:
                notes = (*notes, f"{NOT_SHOWN} `reasoning_content`")
        if has_calls and not all(part in said for part in parts):
            notes = (*notes, f"{NOT_SHOWN} what a turn of the assistant says or thinks beside a call")
        return Turn(asked, said + closing if said.strip() else "", closing, notes)

    def _find_frame(self, before: Messages, tools: list | None) -> tuple[str, str]:
        """What the template writes before and behind an answer to these messages."""
        opened, _, closing = self.write([*before, {"role": "assistant", "content": MARK}], tools).partition(MARK)
        return opened, closing

    def _read_inner_turn(
        self, messages: Messages, number: int, tools: list | None, text: str, alone: Turn
    ) -> Turn | None:
        """A turn that the template changes once others follow: learnt where nothing of it is left out."""
        content = messages[number]["content"] or ""
        marked = [*messages[:number], {**messages[number], "content": MARK}, *messages[number + 1 :]]
        opened = self.write(marked, tools).partition(MARK)[0]
        if messages[number].keys() > PLAIN or not (text.startswith(opened) and opened.startswith(alone.asked)):
            return None
        for said in (content, content.rstrip(), content.lstrip(), content.strip()):
            if text.startswith(said + alone.closing, len(opened)):
                return Turn(alone.asked, opened[len(alone.asked) :] + said + alone.closing, alone.closing)
        return None

    def _find_unseen(
        self, messages: Messages, tools: list | None, text: str, shown: str, apart: list[int]
    ) -> list[str]:
        """Names what the row says and neither the chat's `text` nor what the turns `apart` are asked with has."""
        notes = []
        contents = MARK.join(message["content"] or "" for message in messages)
        for number, message in enumerate(messages):
            content = (message["content"] or "").strip()
            must_show = content and not is_learnt(message) and not THOUGHTS.search(content)
            is_seen = must_show and len(content) >= SURELY and content in shown and contents.count(content) == 1
            if must_show and not is_seen:
                changed = [*messages[:number], {**message, "content": MARK}, *messages[number + 1 :]]
                later = (self.write(changed[:turn], tools, ask=True) for turn in apart if turn > number)
                if MARK not in self.write(changed, tools) and not any(MARK in each for each in later):
                    notes.append(f"{NOT_SHOWN} the {message['role']} message")
            for key in message.keys() - PLAIN - {"weight", "reasoning_content"}:
                is_seen = all(value in shown for value in _leaves(message[key]))
                alike = (key, message["role"], frozenset(message), message is messages[-1], tools is None)
                if is_seen and shown == text and self.shown[alike] < ALIKE:
                    without = {other: value for other, value in message.items() if other != key}
                    changed = [*messages[:number], without, *messages[number + 1 :]]
                    is_seen = not self._shows_the_same(text, changed, tools)
                    self.shown[alike] += is_seen
                if not is_seen:
                    lost = f"{NOT_SHOWN} the key `{key}` of a message"
                    notes.append(lost if key == "tool_calls" else f"the key `{key}` of a message is not used")
            if message.get("weight") and message["role"] != "assistant":
                notes.append(f"a turn of the {message['role']} is not learnt, whatever its `weight` or `train` says")
            if any(_holds_null(_arguments(call) or {}) for call in message.get("tool_calls", ())):
                notes.append("the arguments of a call hold null, which stays as it is")
            if any(_arguments(call) for call in message.get("tool_calls", ())):
                calls = [_without_arguments(call) for call in message["tool_calls"]]
                changed = [*messages[:number], {**message, "tool_calls": calls}, *messages[number + 1 :]]
                if self._shows_the_same(text, changed, tools):
                    notes.append(f"{NOT_SHOWN} the arguments of a call")
        if tools and (not all(_name(tool) in shown for tool in tools) or self._shows_the_same(text, messages, None)):
            notes.append(f"{NOT_SHOWN} the column `tools`")
        return sorted(set(notes))

    def _shows_the_same(self, text: str, messages: Messages, tools: list | None) -> bool:
        """Whether the chat could do without what these messages or tools lack."""
        try:
            return self.write(messages, tools) == text
        except RowError:
            return False

    def _follow(self, shape: Shape, messages: Messages, turns: list[int]) -> Rendering | None:
        """The spans of a chat that is like earlier ones, from its text alone; None where it is not."""
        text, spans, end = self.write(messages), [], 0
        if tuple(map(text.count, shape.openings)) != shape.counts:
            return None  # somebody quotes the template
        for number, opening, lead, closing in zip(turns, shape.openings, shape.leads, shape.closings, strict=True):
            before, said = messages[number - 1]["content"].strip() + opening, messages[number]["content"].strip()
            place = text.find(before + lead + said, end)
            if place < 0 or not said:
                return None
            start = place + len(before)
            end = start + len(lead) + len(said)
            if closing:
                behind = text.find(closing, end)
                if behind < 0 or text[end:behind].strip():
                    return None
                end = behind + len(closing)
            elif messages[number]["content"] != said:
                return None
            spans.append((start, end))
        if not all(message["content"].strip() in text for message in messages):
            return None
        return _cut(text, spans)


def wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template shows content only as a list of parts, as those of some models for images do."""
    for content in (MARK, [{"type": "text", "text": MARK}]):
        try:
            if MARK in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False):
                return content is not MARK
        except Exception:  # whatever a template raises on its own, or that there is none: not shown
            continue
    return False


def with_parts(messages: Messages) -> Messages:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


def _find_shape(messages: Messages, found: list[tuple[int, Turn]], text: str) -> Shape | None:
    openings, leads, closings = [], [], []
    for number, turn in found:
        said = messages[number]["content"].strip()
        lead, _, rest = turn.said.partition(said)
        opening = _behind_last(messages[:number], turn.asked)
        if number == 0 or not opening.strip() or opening == turn.asked or rest.strip() != turn.closing.strip():
            return None
        openings.append(opening)
        leads.append(lead)
        closings.append(turn.closing)
    return Shape(tuple(openings), tuple(leads), tuple(closings), tuple(map(text.count, openings)))


def _cut(text: str, spans: list[tuple[int, int]], notes: tuple[str, ...] = ()) -> Rendering:
    """Asked up to the first span; nothing behind the last one is learnt."""
    first, last = spans[0][0], spans[-1][1]
    moved = tuple((start - first, end - first) for start, end in spans)
    return Rendering(text[:first], text[first:last], moved, notes=notes)


def _is_plain(message: dict[str, Any]) -> bool:
    content = message["content"]
    return message.keys() == PLAIN and isinstance(content, str) and not MARKED_THOUGHTS.search(content)


def _behind_last(messages: Messages, text: str) -> str:
    """What follows the last message in a text; all of it where that message is not found."""
    content = (messages[-1]["content"] or "").strip() if messages else ""
    return text.rpartition(content)[2] if content else text


def _rest_behind(text: str, start: str) -> str | None:
    """What stands in `text` behind `start`, which may have other blanks; None where it begins otherwise."""
    if text.startswith(start):
        return text[len(start) :]
    place = 0
    for character in "".join(start.split()):
        while text[place : place + 1].isspace():
            place += 1
        if text[place : place + 1] != character:
            return None
        place += 1
    return text[place:].lstrip() if start[-1:].isspace() else text[place:]


def _without_none(messages: Messages) -> Messages:
    return [{**message, "content": message["content"] or ""} for message in messages]


def _with_arguments_as_text(messages: Messages) -> Messages:
    """Tool calls with their arguments as JSON, which some templates want, instead of as an object."""
    changed = _without_none(messages)
    for message in changed:
        if message.get("tool_calls"):
            calls = json.loads(json.dumps(message["tool_calls"]))
            for call in calls:
                function = call.get("function", call)
                if not isinstance(function.get("arguments"), str):
                    function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
            message["tool_calls"] = calls
    return changed


def _find_written_by_python(messages: Messages, text: str) -> list[str]:
    """Arguments of calls that stand in the text in Python's words, {'a': 1}: the template wants them as JSON text."""
    calls = (call for message in messages for call in message.get("tool_calls") or ())
    arguments = (each for each in map(_arguments, calls) if each and isinstance(each, dict))
    written = ((str(each), json.dumps(each, ensure_ascii=False)) for each in arguments)
    return [by_python for by_python, as_json in written if by_python != as_json and by_python in text]


def _arguments(call: Any) -> Any:
    return call.get("function", call).get("arguments") if isinstance(call, dict) else None


def _holds_null(value: Any) -> bool:
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(map(_holds_null, within))


def _without_arguments(call: dict) -> dict:
    return {**call, "function": {**call.get("function", call), "arguments": {}}}


def _name(tool: Any) -> str:
    function = tool.get("function", tool) if isinstance(tool, dict) else {}
    return str(function.get("name", ""))


def _leaves(value: Any) -> list[str]:
    """What must be seen of a message's key: the names of called functions, or the value itself."""
    if isinstance(value, list):
        return [_name(each) for each in value]
    return [str(value)]
