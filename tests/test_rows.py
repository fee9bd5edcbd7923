"""Rows as they come: what is learnt of them, what is told, what is refused. Run: pytest tests/test_rows.py"""

import gzip
import json
import logging
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from conftest import write_rows
from tiny import make_tokenizer

from align.data.chats import ChatTemplate
from align.data.formats import without_nones
from align.data.loading import DataArguments
from align.data.packing import IGNORED
from align.data.preparing import prepare_data
from align.data.tokenization import SampleTokenizer, tokenize_pairs, tokenize_samples
from align.errors import InputError

TOOLS_TEMPLATE = (
    "{% if tools %}{{ 'TOOLS ' + (tools | tojson) }}{% endif %}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|stop|>' }}{% for call in m.get('tool_calls') or [] %}"
    "{{ 'CALL ' + call['function']['name'] }}{% endfor %}{{ (m['content'] or '') + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>' }}{% endif %}"
)
REASONING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHOWS_ARGUMENTS = TOOLS_TEMPLATE.replace("call['function']['name']", "call['function']['arguments'] | tojson")
SWALLOWS_TEXT = TOOLS_TEMPLATE.replace("(m['content'] or '')", "('' if m.get('tool_calls') else m['content'])")
NO_TOOL = TOOLS_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
NO_SYSTEM = TOOLS_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")

ENDS_CALLS = "(m['content'] or '') + ('<|start|>' if m.get('tool_calls') else '<|eot|>')"
CALL_WITHOUT_BLANK = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ (messages[0]['content'] if loop.last else '') + '[INST] ' + "
    "m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{% for call in m.get('tool_calls') or [] %}"
    "{{ 'CALL ' + call['function']['name'] }}{% else %}{{ ' ' + m['content'] }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def user(content):
    return {"role": "user", "content": content}


def said(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.fixture
def prepare(caplog):
    """What is learnt of `rows`: the texts of all learnt runs of each sample; for pairs of both answers."""

    def prepare(rows, kind="llama-3", template=None, preference=False, name="rows.jsonl", length=256, **flags):
        caplog.set_level(logging.INFO)
        tokenizer = make_tokenizer(kind)
        tokenizer.chat_template = template or tokenizer.chat_template
        samples = SampleTokenizer(tokenizer)
        tokenize = partial(tokenize_samples, tokenizer=samples, max_length=length, truncation="keep_start")
        if preference:
            limits = {"max_prompt_length": length, "max_length": 2 * length}
            tokenize = partial(tokenize_pairs, tokenizer=samples, truncation="keep_start", **limits)
        if rows is not None:
            write_rows(name, rows)
        args = DataArguments(dataset_name=[name] if isinstance(name, str) else name, num_workers=1, **flags)
        training = SimpleNamespace(do_train=True, do_eval=False, max_steps=0, seed=0, output_dir="out")
        has_template, key = bool(tokenizer.chat_template), f"{samples.fingerprint} {length}"
        found = prepare_data(args, training, "data/x", tokenize, key, has_template, preference=preference)["train"]

        def learnt(row, labels):
            return [tokenizer.decode(run) for run in find_runs(row[labels])]

        if preference:
            return [(learnt(row, "chosen_labels"), learnt(row, "rejected_labels")) for row in found.rows]
        return [learnt(row, "labels") for row in found.rows]

    return prepare


def find_runs(labels):
    """The learnt tokens, parted where others stand between them."""
    runs, before = [], IGNORED
    for label in labels:
        if label != IGNORED:
            runs = [*runs, [label]] if before == IGNORED else [*runs[:-1], [*runs[-1], label]]
        before = label
    return runs


END = "<|eot|><|end|>"
CALL = [{"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
WITH_TOOLS = {
    "messages": [user("2"), said(None, tool_calls=CALL), {"role": "tool", "content": "4", "name": "add"}, said("four")],
    "tools": TOOLS,
}
# what: (row, flags, learnt texts of the sample, what the log says)
FINE_TUNING = {
    "columns that nobody uses": (
        {"prompt": "Hi", "completion": "Yo", "id": 3, "source": "x"},
        {},
        ["Yo" + END],
        ["columns not used: id, source"],
    ),
    "system and history of alpaca rows": (
        {"instruction": "do", "input": "", "output": "c", "system": "Be", "history": [["q", "r"]]},
        {},
        ["r<|eot|>", "c" + END],
        ["columns not used: none"],
    ),
    "history in plain wording": (
        {"instruction": "do", "output": "c", "history": [["q", "r"]]},
        {"kind": "gpt2"},
        ["c<|endoftext|>"],
        ["as text", "the answers in `history` are shown, but not learnt: 1 of 1"],
    ),
    "tools and calls that the template shows": (
        WITH_TOOLS,
        {"template": TOOLS_TEMPLATE},
        ["CALL add<|eot|>", "four" + END],
        ["columns not used: none"],
    ),
    "tools and calls that the template loses": (
        WITH_TOOLS,
        {},
        ["four" + END],
        [
            "does not show the column `tools`",
            "does not show the key `tool_calls` of a message",
            "a turn of the assistant that the chat template shows as nothing is not learnt",
        ],
    ),
    "a call of which the template shows an empty answer": (
        WITH_TOOLS,
        {"template": TOOLS_TEMPLATE.replace("{% for call in m.get('tool_calls') or [] %}", "SAY {% for call in [] %}")},
        ["SAY four" + END],
        ["a turn of the assistant that the chat template shows as nothing is not learnt"],
    ),
    "a call without the blank that answers have, behind a system message that the template only asks with": (
        {"messages": [{"role": "system", "content": "Be"}, user("2"), said(None, tool_calls=CALL)]},
        {"kind": "qwen", "template": CALL_WITHOUT_BLANK},
        ["CALL add<|im_end|>"],
        ["columns not used: none"],
    ),
    "a call that ends with a token of its own": (
        WITH_TOOLS,
        {"template": TOOLS_TEMPLATE.replace("(m['content'] or '') + '<|eot|>'", ENDS_CALLS)},
        ["CALL add<|start|>", "four" + END],
        ["does not show the arguments of a call"],
    ),
    "a turn of weight 0": (
        {"messages": [user("a"), said("bad", weight=0), user("b"), said("good")]},
        {},
        ["good" + END],
        [],
    ),
    "a turn that is not to be trained": (
        {"messages": [user("a"), said("bad", train=False), user("b"), said("good", train=True)]},
        {},
        ["good" + END],
        [],
    ),
    "a turn that a text says is not to be trained": (
        {"messages": [user("a"), said("bad", train="false"), user("b"), said("good")]},
        {},
        ["good" + END],
        [],
    ),
    "a turn whose weight is a text": (
        {"messages": [user("a"), said("bad", weight="0"), user("b"), said("good", weight="1.0")]},
        {},
        ["good" + END],
        [],
    ),
    "texts without roles, as in LIMA and UltraChat": (
        {"conversations": ["a", "b", "c", "d"]},
        {},
        ["b<|eot|>", "d" + END],
        ["texts without a role are taken for turns of user and assistant, the user first: 1 of 1 samples"],
    ),
    "a text without a role that is a message as JSON": (
        {"conversations": ["a", json.dumps(said("b"))]},
        {},
        [json.dumps(said("b")) + END],
        ["texts without a role are taken for turns of user and assistant, the user first: 1 of 1 samples"],
    ),
    "messages that are JSON one by one": (
        {"messages": [json.dumps(user("a")), json.dumps(said("b"))]},
        {},
        ["b" + END],
        [],
    ),
    "a text that has BOS and EOS of its own": (
        {"text": "<s>Hello there</s>"},
        {"kind": "llama-2"},
        ["Hello there</s>"],
        [],
    ),
    "arguments that the template would write in Python's words": (
        {"messages": [user("2"), said(None, tool_calls=CALL)]},
        {"template": SHOWS_ARGUMENTS.replace(" | tojson }}{% endfor %}", " }}{% endfor %}")},
        ['CALL {"a": 1}' + END],
        [],
    ),
    "a template that writes JSON, where Python's words would be JSON as well": (
        {"messages": [user("2"), said(None, tool_calls=[{"function": {"name": "a", "arguments": {"it's": 1}}}])]},
        {"template": SHOWS_ARGUMENTS},
        ['CALL {"it\'s": 1}' + END],
        [],
    ),
    "a tool that repeats its call in Python's words": (
        {"messages": [user("2"), said(None, tool_calls=CALL), {"role": "tool", "content": "{'a': 1}"}, said("four")]},
        {"template": SHOWS_ARGUMENTS.replace(" | tojson }}{% endfor %}", " }}{% endfor %}")},
        ['CALL {"a": 1}<|eot|>', "four" + END],
        [],
    ),
    "a call in OpenAI's older words": (
        {
            "messages": [
                user("2"),
                said(None, function_call={"name": "add", "arguments": "{}"}),
                {"role": "function", "content": "4"},
                said("four"),
            ]
        },
        {"template": TOOLS_TEMPLATE},
        ["CALL add<|eot|>", "four" + END],
        [],
    ),
    "a label that says nothing about the answer": (
        {"prompt": "a", "completion": "b", "label": "sport"},
        {},
        ["b" + END],
        ["columns not used: label"],
    ),
    "half a character in a column that nobody uses": (
        {"prompt": "a", "completion": "b", "source": "\ud83d"},
        {},
        ["b" + END],
        ["columns not used: source"],
    ),
    "an answer that begins with the words of its prompt": (
        {"prompt": "Hello there", "completion": "Hello therefore"},
        {},
        ["Hello therefore" + END],
        [],
    ),
    "flags that change nothing": (
        {"prompt": "a", "completion": "b"},
        {"shuffle_buffer": 7, "max_bad_rows": 0.5, "eval_subset": "x"},
        ["b" + END],
        [
            "--shuffle_buffer has no effect here: nothing is read as a stream",
            "--max_bad_rows has no effect here",
            "--eval_subset has no effect here: nothing is evaluated",
        ],
    ),
    "wording without a chat template": (
        {"prompt": "a", "completion": "b"},
        {"kind": "gpt2", "text_as_chat": False},
        ["b<|endoftext|>"],
        ["--text_as_chat has no effect here: the tokenizer has no chat template"],
    ),
    "an answer beside its scores": (
        {"instruction": "do", "completions": [{"response": "b", "overall_score": 3, "critique": "c", "model": "m"}]},
        {},
        ["b" + END],
        ["keys of `completions` that are not used: critique, model: 1 of 1 samples"],
    ),
    "true labels alone": (
        {"prompt": "a", "completion": "b", "label": True},
        {"only_true_labels": True},
        ["b" + END],
        [],
    ),
    "SQuAD": (
        {"context": "C", "question": "Q?", "answers": {"text": ["A", "B"], "answer_start": [1, 2]}, "title": "t"},
        {},
        ["A" + END],
        ["context + question + answers", "columns not used: title", "of several answers the first is used: 1 of 1"],
    ),
    "an empty turn": (
        {"messages": [user("a"), said(""), user("b"), said("good")]},
        {},
        ["good" + END],
        ["shows as nothing is not learnt: 1 of 1 samples, first rows.jsonl, row 1"],
    ),
    "a system message that the template swallows": (
        {"messages": [{"role": "system", "content": "Be"}, user("a"), said("b")]},
        {"template": NO_SYSTEM},
        ["b" + END],
        ["does not show the system message: 1 of 1 samples, first rows.jsonl, row 1"],
    ),
    "a system message that the template swallows and a word of which somebody says": (
        {"messages": [{"role": "system", "content": "four"}, user("four?"), said("b")]},
        {"template": NO_SYSTEM},
        ["b" + END],
        ["does not show the system message: 1 of 1 samples, first rows.jsonl, row 1"],
    ),
    "keys of messages that nothing is for": (
        {"messages": [user("a"), said("b", mood="glad")]},
        {},
        ["b" + END],
        ["the key `mood` of a message is not used: 1 of 1 samples"],
    ),
    "a score beside the content of a message": (
        {"messages": [user("a"), {**said("b"), "value": 0.7, "from": 3}]},
        {},
        ["b" + END],
        ["the key `value` of a message is not used: 1 of 1 samples", "the key `from` of a message is not used"],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {},
        ["Yo" + END],
        [],
    ),
    "ShareGPT with a call": (
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "Yo"},
            ]
        },
        {"template": TOOLS_TEMPLATE},
        ["CALL add<|eot|>", "Yo" + END],
        [],
    ),
    "ShareGPT with role and content": (
        {"conversations": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yo"}]},
        {},
        ["Yo" + END],
        [],
    ),
    "tools that the template loses though somebody names them": (
        {"messages": [user("add two"), said("four")], "tools": TOOLS},
        {},
        ["four" + END],
        ["does not show the column `tools`"],
    ),
    "arguments of a call that the template loses": (
        WITH_TOOLS,
        {"template": TOOLS_TEMPLATE},
        ["CALL add<|eot|>", "four" + END],
        ["does not show the arguments of a call: 1 of 1 samples"],
    ),
    "a chat that ends with a question": (
        {"messages": [user("a"), said("b"), user("c")]},
        {},
        ["b" + END],
        ["what follows the last turn of the assistant is not used: 1 of 1 samples"],
    ),
    "thoughts in a key on a template that merely speaks of thinking": (
        {"messages": [user("a"), said("four", reasoning_content="so")]},
        {"template": NO_SYSTEM.replace("TOOLS", "You think with TOOLS")},
        ["four" + END],
        ["does not show `reasoning_content`"],
    ),
    "parts of text and a developer": (
        {"messages": [{"role": "developer", "content": "D"}, user([{"type": "text", "text": "Hi"}]), said("Yo")]},
        {},
        ["Yo" + END],
        [],
    ),
    "parts and weights in LLaMA-Factory's words": (
        {
            "messages": [
                user([{"type": "text", "value": "Hi"}]),
                said([{"type": "text", "value": "bad"}], loss_weight=0.0),
                user("and?"),
                said([{"type": "text", "value": "Yo"}], loss_weight=1.0),
            ]
        },
        {},
        ["Yo" + END],
        [],
    ),
    "lists of one message": ({"prompt": [user("Hi")], "completion": [said("Yo")]}, {}, ["Yo" + END], []),
    "thoughts in a key of their own": (
        {"messages": [user("a"), said("four", reasoning_content="so")]},
        {"kind": "qwen", "template": REASONING_TEMPLATE},
        ["<think>\nso\n</think>\n\nfour<|im_end|>"],
        [],
    ),
    "thoughts that the template leaves out": (
        {"messages": [user("a"), said("<think>\nso\n</think>\n\nfour")]},
        {"kind": "qwen", "template": REASONING_TEMPLATE},
        ["<think>\nso\n</think>\n\nfour<|im_end|>"],
        ["thoughts that the chat template leaves out are learnt as they were said"],
    ),
    "plain wording on an instruct tokenizer": (
        {"question": "Q?", "answer": "A"},
        {"text_as_chat": False},
        [" A<|end|>"],
        ["question-answer rows (question + answer), as text"],
    ),
    "null in the arguments of a call": (
        {"messages": [user("2"), said(None, tool_calls=[{"function": {"name": "add", "arguments": {"a": None}}}])]},
        {"template": SHOWS_ARGUMENTS},
        ['CALL {"a": null}' + END],
        ["the arguments of a call hold null, which stays as it is: 1 of 1 samples"],
    ),
    "an answer that is JSON and no message": (
        {"prompt": "a", "completion": '{"from": "Bob", "to": "Al"}'},
        {},
        ['{"from": "Bob", "to": "Al"}' + END],
        [],
    ),
    "input and context beside an instruction": (
        {"instruction": "do", "input": "i", "context": "c", "response": "r"},
        {},
        ["r" + END],
        ["columns not used: none"],
    ),
    "a system prompt beside answers of which one has no score": (
        {
            "system": "Be",
            "instruction": "do",
            "completions": [{"response": "a"}, {"response": "b", "overall_score": 3}],
        },
        {},
        ["b" + END],
        ["columns not used: none", "of several `completions` the best is used, by `overall_score`: 1 of 1"],
    ),
    "a user's turn that is to be learnt": (
        {"messages": [{**user("a"), "train": True}, said("b")]},
        {},
        ["b" + END],
        ["a turn of the user is not learnt, whatever its `weight` or `train` says: 1 of 1 samples"],
    ),
    "what a tool says, which the template swallows and the answer repeats": (
        {
            "messages": [
                user("2"),
                {"role": "tool", "content": "It is 21 degrees today."},
                said("It is 21 degrees today."),
            ]
        },
        {"template": NO_TOOL},
        ["It is 21 degrees today." + END],
        ["does not show the tool message: 1 of 1 samples"],
    ),
    "a key that the template loses though somebody says its word": (
        {"messages": [{**user("ask Bob"), "name": "Bob"}, said("b")]},
        {},
        ["b" + END],
        ["the key `name` of a message is not used: 1 of 1 samples"],
    ),
    "flags of the chat template for plain text": (
        {"text": "Hello there"},
        {"text_as_chat": True, "chat_template": "plain"},
        ["Hello there<|end|>"],
        ["--text_as_chat has no effect on rows.jsonl: plain text", "--chat_template has no effect on rows.jsonl"],
    ),
    "what is said beside a call, which the template swallows": (
        {"messages": [user("2"), said("Let me see.", tool_calls=CALL), {"role": "tool", "content": "4"}, said("four")]},
        {"template": SWALLOWS_TEXT},
        ["CALL add<|eot|>", "four" + END],
        ["does not show what a turn of the assistant says or thinks beside a call: 1 of 1 samples"],
    ),
    "characters that the tokenizer does not know": (
        {"text": "Hi 日本"},
        {"kind": "llama-2"},
        ["Hi <unk><unk></s>"],
        ["characters that the tokenizer does not know have become its unk_token: 1 of 1 samples"],
    ),
    "a text that is too long": (
        {"text": "Hello there, how are you today? " * 20},
        {"length": 4},
        ["Hello there,"],
        ["cut: 1 lost its end, and the token that ends it"],
    ),
}


@pytest.mark.parametrize("what", FINE_TUNING)
def test_fine_tuning_learns_and_tells_what_a_row_says(what, prepare, caplog):
    row, flags, learnt, told = FINE_TUNING[what]
    assert prepare([row], **flags) == [learnt]
    for text in told:
        assert text in caplog.text


FORGETS = REASONING_TEMPLATE.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
SYSTEM_LAST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}{% if messages[0]['role'] == 'system' and "
    "loop.index >= messages | length - 1 %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = [user("a"), said("b", reasoning_content="so"), user("c"), said("d", reasoning_content="hm")]
# what: (chat, template, learnt texts of each sample): of later turns the template shows earlier ones otherwise
APART = {
    "thoughts of earlier turns are forgotten": (
        THINKING,
        FORGETS,
        [["<think>\nhm\n</think>\n\nd<|im_end|>"], ["<think>\nso\n</think>\n\nb<|im_end|>"]],
    ),
    "a system message stands at the last question": (
        [{"role": "system", "content": "Be"}, user("a"), said("b"), user("c"), said("d")],
        SYSTEM_LAST,
        [["d<|im_end|>"], ["b<|im_end|>"]],
    ),
    "other blanks while asked": (
        [user("a"), said("b"), user("c"), said("d")],
        "{% for m in messages %}{{ m['role'] + ':\n\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ ' assistant:\n' }}{% endif %}",
        [["b<|im_end|>"], ["d<|im_end|>"]],
    ),
}


@pytest.mark.parametrize("what", APART)
def test_a_turn_that_is_shown_otherwise_later_is_a_sample_of_its_own(what, prepare, caplog):
    messages, template, learnt = APART[what]
    assert prepare([{"messages": messages}] * 2, kind="qwen", template=template) == learnt * 2
    assert "turns of the assistant that the chat template changes once others follow become samples of" in caplog.text
    assert "does not show the system message" not in caplog.text


def test_a_short_system_message_that_only_a_question_shows_is_not_told_as_lost(prepare, caplog):
    shows_when_asked = SYSTEM_LAST.replace("loop.index >= messages | length - 1", "loop.last")
    prepare([{"messages": [{"role": "system", "content": "Be"}, user("a"), said("b")]}], "qwen", shows_when_asked)
    assert "does not show" not in caplog.text


PAIRS = {
    "an answer that merely begins as the prompt does": (
        {"prompt": "Hello", "chosen": "Hello! How can I help?", "rejected": "Hello no"},
        ["Hello! How can I help?"],
        ["Hello no"],
    ),
    "numbers that begin alike": ({"prompt": "1", "chosen": "10 apples", "rejected": "11"}, ["10 apples"], ["11"]),
    "a prompt that both answers repeat": (
        {"prompt": "What is it", "chosen": "What is it Yes", "rejected": "What is it No"},
        ["Yes"],
        ["No"],
    ),
    "answers of several turns": (
        {
            "prompt": [user("hi")],
            "chosen": [said("yo"), user("more"), said("ok")],
            "rejected": [said("no"), user("why"), said("so")],
        },
        ["yo", "ok"],
        ["no", "so"],
    ),
    "transcripts of hh-rlhf": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: More\n\nAssistant: Fine",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: More\n\nAssistant: Bad",
        },
        ["Fine"],
        ["Bad"],
    ),
    "LLaMA-Factory": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Yo"},
            "rejected": {"from": "gpt", "value": "No"},
        },
        ["Yo"],
        ["No"],
    ),
    "orca": ({"system": "Be", "question": "Q?", "chosen": "A", "rejected": "B"}, ["A"], ["B"]),
    "UltraFeedback": (
        {"prompt": "P?", "chosen": [user("P?"), said("C")], "rejected": [user("P?"), said("D")], "score_chosen": 8},
        ["C"],
        ["D"],
    ),
}


@pytest.mark.parametrize("kind", ["llama-3", "gpt2"])
@pytest.mark.parametrize("what", PAIRS)
def test_of_a_pair_the_answers_are_scored_and_nothing_else(what, kind, prepare):
    row, chosen, rejected = PAIRS[what]
    template = (
        TOOLS_TEMPLATE if kind == "gpt2" and any(isinstance(each, list | dict) for each in row.values()) else None
    )
    (pair,) = prepare([row], kind=kind, template=template, preference=True)
    plain = [[text.split("<|")[0].strip() for text in answer] for answer in pair]
    assert plain == [chosen, rejected]


REFUSED = {
    "KTO": ({"prompt": "a", "completion": "b", "label": False}, {}, "--only_true_labels trains on the true ones alone"),
    "KTO of chats for dpo.py": (
        {"messages": [user("a"), said("b")], "label": True},
        {"preference": True},
        "are single answers with a label, as KTO takes them, and no pairs",
    ),
    "single answers for dpo.py": (
        {"prompt": "a", "completion": "b", "id": 3},
        {"preference": True},
        "prompt, completion, id are prompt-completion rows, which have one answer each; preferences need a better and",
    ),
    "KTO in numbers": (
        {"instruction": "a", "output": "b", "label": 0},
        {},
        "--only_true_labels trains on the true ones alone, and --columns other=label leaves the column unused",
    ),
    "true labels of rows without": (
        {"prompt": "a", "completion": "b"},
        {"only_true_labels": True},
        "--only_true_labels: rows.jsonl has no column label or kto_tag; found prompt, completion",
    ),
    "a turn that is trained or not": (
        {"messages": [user("a"), said("b", train="later")]},
        {},
        "message 2: `train` is str 'later', neither true nor false",
    ),
    "a number for an answer": (
        {"prompt": "a", "completion": 2},
        {},
        "column `completion` is int '2', neither text nor messages",
    ),
    "a prompt of another name": (
        {"system": "S", "input": "Q?", "chosen": "a", "rejected": "b"},
        {"preference": True},
        "there is no column `prompt`: name the one that holds it with --columns prompt=input",
    ),
    "a column that is taken twice": (
        {"ask": "a", "rejected": "b"},
        {"preference": True, "columns": ["prompt=ask,chosen=ask"]},
        "--columns: takes 'ask' twice",
    ),
    "a folder inside a file": ({"text": "a"}, {"subset": "data"}, "--subset: rows.jsonl is a file"),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "A"}, user("b"), said("c")], "system": "B"},
        {},
        "two different system prompts",
    ),
    "a turn of which two things are said": (
        {"messages": [user("a"), said("b", train=True, weight=0)]},
        {},
        "message 2: `train` and `weight` say two different things",
    ),
    "a message that says two things": (
        {"conversations": [{"from": "human", "value": "a", "content": "b"}, {"from": "gpt", "value": "c"}]},
        {},
        "message 1: `value` and `content` say two different things",
    ),
    "thoughts that are no text": (
        {"messages": [user("a"), said("b", reasoning_content=["so"])]},
        {},
        "message 2: `reasoning_content` is list .*, not text",
    ),
    "a score that is no number": (
        {
            "instruction": "do",
            "completions": [{"response": r, "overall_score": s} for r, s in (("a", math.nan), ("b", 1))],
        },
        {"preference": True},
        "too few answers with a `response` and a number",
    ),
    "two answers of which a score says which is better": (
        {"question": "Q?", "answer_0": "a", "answer_1": "b", "score_0": 1.0, "score_1": -1.0},
        {"preference": True},
        "^(?!.*chosen=answer).*nearest is",
    ),
    "columns in capitals": (
        {"Prompt": "a", "Completion": "b"},
        {},
        "nearest is prompt-completion .*: --columns prompt=Prompt,completion=Completion",
    ),
    "an image": ({"messages": [user([{"type": "image"}]), said("b")]}, {}, "a part that is not text but 'image'"),
    "half a weight": ({"messages": [user("a"), said("b", weight=0.5)]}, {}, "0 is not learnt, 1 is"),
    "nothing but an empty turn": ({"messages": [user("a"), said(" ")]}, {}, "shows no turn of the assistant"),
    "columns of another name": (
        {"question": "Q?", "good": "C", "bad": "D"},
        {"preference": True},
        "nearest is question-pair .*: --columns chosen=good,rejected=bad",
    ),
    "a renamed column that is not there": (
        {"text": "a"},
        {"columns": ["text=body"]},
        "--columns: rows.jsonl has no column 'body'; found text",
    ),
    "half a character": ({"text": "\ud83d"}, {}, "rows.jsonl, row 1: column `text` holds half a character"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_learnt_is_refused_with_the_row_or_the_flag(what, prepare):
    row, flags, message = REFUSED[what]
    with pytest.raises(InputError, match=message):
        prepare([row], **flags)


def test_a_chat_like_earlier_ones_is_rendered_no_more_for_keys_that_were_seen_to_count(monkeypatch):
    tokenizer = make_tokenizer("llama-3")
    tokenizer.chat_template = TOOLS_TEMPLATE.replace("(m['content'] or '')", "(m['content'] or '') + m.get('mood', '')")
    template, written = ChatTemplate(tokenizer), []
    write = template.write
    monkeypatch.setattr(template, "write", lambda *given, **more: written.append(given) or write(*given, **more))
    counts, notes = [], []
    for word in ("", "", "", "", "glad"):  # the template never writes the key `word`
        chat = [{**user("a"), "mood": "glad", **({"word": word} if word else {})}, said("b")] * 5
        written.clear()
        notes.append(template.render([], chat)[0].notes)
        counts.append(len(written))
    assert counts[0] > counts[3] == counts[2]
    assert notes == [(), (), (), (), ("the key `word` of a message is not used",)]


def test_rows_of_which_nothing_shall_be_learnt_are_left_out_and_counted(prepare, caplog):
    rows = [{"messages": [user("a"), said("bad", weight=0)]}, {"messages": [user("a"), said("good")]}]
    assert prepare(rows) == [["good" + END]]
    assert "dropped: 1 every turn of the assistant has the weight 0" in caplog.text


def test_reasons_and_notes_that_differ_in_what_they_quote_are_counted_together(prepare, caplog):
    template = REASONING_TEMPLATE.replace("m['content'].split", "(m['content'] | upper).split")
    template = template.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    turns = [[user(f"Hello {number}"), said("YES"), user(f"And {number}"), said("YES")] for number in range(4)]
    rows = [{"messages": messages} for messages in turns]
    rows += [{"messages": [user(f"Hello {number}"), {"role": f"friend{number}", "content": "a"}]} for number in (1, 2)]
    prepare(rows, "qwen", template, bad_rows="skip", max_bad_rows=1)
    assert caplog.text.count("asked with …") == 1
    assert "4 of 4 samples, first rows.jsonl, row 1" in caplog.text
    assert "dropped: 2 bad row: column `messages`, message 2: role 'friend1' is none of" in caplog.text


def test_a_chat_of_thoughts_may_begin_with_the_assistant(prepare):
    messages = [said("<think>\na\n</think>\n\nHello"), user("hi"), said("fine")]
    learnt = prepare([{"messages": messages}], "qwen", "{{ messages[0].role and '' }}" + REASONING_TEMPLATE)
    assert learnt == [["fine<|im_end|>"], ["<think>\na\n</think>\n\nHello<|im_end|>"]]


def test_rows_that_all_fail_alike_are_not_skipped(prepare):
    with pytest.raises(InputError, match=r"row 1: column `messages` .* \(as all of the first 20 rows\)"):
        prepare([{"messages": f"x{number}"} for number in range(20)], bad_rows="skip", max_bad_rows=1)


def test_a_column_that_only_later_rows_have_is_told(prepare, caplog):
    prepare([{"text": "Hello"}] * 1000 + [{"text": "Hello", "mood": "glad"}])
    assert "columns that the first rows do not have are not used: mood: 1 of 1,001 samples" in caplog.text
    assert "first rows.jsonl, row 1001" in caplog.text


def test_columns_are_renamed(prepare):
    rows = [{"ask": "P?", "good": "C", "bad": "D"}]
    renamed = prepare(rows, preference=True, columns=["prompt=ask,chosen=good", "rejected=bad"])
    assert renamed == [(["C" + END], ["D" + END])]


def test_rows_in_the_cache_are_not_taken_for_those_of_other_flags(prepare):
    row = {"prompt": "a", "completion": "b"}
    assert prepare([row, row | {"label": False}], only_true_labels=True) == [["b" + END]]
    with pytest.raises(InputError, match="row 2: .* --only_true_labels trains on the true ones alone"):
        prepare(None)

    assert prepare([row, row | {"completion": ""}], bad_rows="skip", max_bad_rows=1) == [["b" + END]]
    with pytest.raises(InputError, match="row 2: column `completion` is empty"):
        prepare(None)

    write_rows("rows.jsonl", [{"ask": "a", "say": "b"}])
    learnt = [
        prepare(None, columns=[columns]) for columns in ("prompt=ask,completion=say", "prompt=say,completion=ask")
    ]
    assert learnt == [[["b" + END]], [["a" + END]]]

    write_rows("rows.jsonl", [row])
    learnt = [prepare(None, text_as_chat=as_chat) for as_chat in (True, False)]
    assert learnt == [[["b" + END]], [["b<|end|>"]]]


def test_a_replaced_file_of_the_same_time_and_size_is_read_anew(prepare):
    import os

    before = prepare([{"text": "Hello there"}])
    time = os.stat("rows.jsonl").st_mtime_ns
    write_rows("rows.jsonl", [{"text": "Hello where"}])
    os.utime("rows.jsonl", ns=(time, time))
    assert prepare(None) != before


@pytest.mark.parametrize("damage", [b"", b"broken"])
def test_a_damaged_cache_is_noticed_and_made_anew(prepare, caplog, damage, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    before = prepare([{"text": "Hello there, how are you"}] * 5)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "align"
    newest = max(cache.glob("tokens-*.arrow"), key=lambda path: path.stat().st_mtime_ns)
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2] + damage)
    assert prepare(None) == before
    assert "is damaged, and is made anew" in caplog.text


def test_of_typed_rows_nulls_are_looked_for_in_the_columns_that_are_read(prepare, monkeypatch):
    import datasets

    seen = []
    monkeypatch.setattr("align.data.preparing.without_nones", lambda value: seen.append(value) or without_nones(value))
    row = {"ask": [{**user("a"), "mood": None}, said("b")], "embedding": [[0.5, None]]}
    datasets.Dataset.from_list([row]).to_parquet("rows.parquet")
    assert prepare(None, name="rows.parquet", columns=["messages=ask"]) == [["b" + END]]
    assert seen
    assert not any(0.5 in each for value in seen for each in value)


def test_damaged_rows_of_parquet_files_are_noticed_and_made_anew(prepare, caplog, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([{"text": "Hello there, how are you"}] * 5).to_parquet("rows.parquet")
    before = prepare(None, name="rows.parquet", length=100)
    (rows,) = (tmp_path / "cache").rglob("parquet-train.arrow")
    rows.write_bytes(rows.read_bytes().replace(b"there", b"where"))
    assert prepare(None, name="rows.parquet", length=101) == before
    assert "is damaged, and is made anew" in caplog.text


TABLE = "prompt,completion\n2024-01-02,NA\n12,True\n"
FILES = {
    "rows.csv": TABLE.encode(),
    "bom.csv": b"\xef\xbb\xbf" + TABLE.encode(),
    "rows.csv.gz": gzip.compress(TABLE.encode()),
    "rows.tsv": TABLE.replace(",", "\t").encode(),
    "rows.jsonl.zst": zstandard.compress(
        b'{"prompt": "2024-01-02", "completion": "NA"}\n\n{"prompt": "12", "completion": "True"}\n'
    ),
    "rows.json": b'[{"prompt": "2024-01-02", "completion": "NA", "odd": 1}, '
    b'{"prompt": "12", "completion": "True", "odd": {}}]',
}

# The further column has more separators of another kind in its name than the file has columns
FILES["commas.tsv"] = b"prompt\tcompletion\tnotes, if any, or none\n2024-01-02\tNA\t\n12\tTrue\t\n"
FILES["semicolons in a name.csv"] = b'prompt,completion,"why; how; when; who"\n2024-01-02,NA,\n12,True,\n'
FILES["blanks.csv"] = b"\n" + TABLE.replace("prompt,", "prompt , ").encode()
FILES["semicolons.csv"] = TABLE.replace(",", ";").encode()
FILES["ROWS.CSV.GZ"] = FILES["rows.csv.gz"]


@pytest.mark.parametrize("name", FILES)
def test_text_stays_text_in_files_of_any_kind(name, prepare):
    Path(name).write_bytes(FILES[name])
    assert prepare(None, name=name) == [["NA" + END], ["True" + END]]


LINES = b'{"prompt": "a", "completion": "b"}\n' * 40
BROKEN = {
    "utf16.csv": (TABLE.encode("utf-16"), "utf16.csv is UTF-16; save it as UTF-8"),
    "twice.csv": (b"prompt,completion,completion\na,b,c\n", "has more than one column 'completion'"),
    "twice.jsonl": (b'{"prompt": "a", "prompt": "b"}', "row 1: the key `prompt` twice in one object"),
    "quote.csv": (b'prompt,completion\na,"b\nc,d\n' * 2 + b'e,"f', "row 3: a quote is opened and not closed"),
    "cut.json": (
        b'[{"prompt": "a", "completion": "b"}, {"prompt": "a"',
        "row 2: not JSON: .*; what follows is not read",
    ),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "cut.jsonl.gz cannot be read: Compressed file ended before"),
    "cut.jsonl.zst": (zstandard.compress(LINES)[:-5], "cut.jsonl.zst cannot be read: it breaks off before its end"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_of_which_a_part_would_be_lost_is_refused_even_where_bad_rows_are_skipped(name, prepare):
    content, message = BROKEN[name]
    Path(name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare(None, name=name, bad_rows="skip", max_bad_rows=1)


def test_a_folder_of_several_kinds_of_files_is_read_whole_or_says_what_is_not(prepare, caplog):
    Path("both").mkdir()
    write_rows("both/train.jsonl", [{"prompt": "a", "completion": "A"}])
    Path("both/train.csv").write_text("prompt,completion\nb,B\n")
    write_rows("both/more.jsonl", [{"prompt": "c", "completion": "C"}])
    Path("both/notes.txt").write_text("read me")
    assert sorted(prepare(None, name="both")) == [["A" + END], ["B" + END]]
    assert "both: not read: more.jsonl, notes.txt" in caplog.text


def test_data_sets_are_mixed_by_their_shares_each_in_its_own_format(prepare, caplog):
    write_rows("a.jsonl", [{"prompt": f"a{i}", "completion": "A"} for i in range(70)])
    write_rows("b.jsonl", [{"messages": [user(f"b{i}"), said("B")]} for i in range(100)])
    learnt = prepare(None, name=["a.jsonl", "b.jsonl"], dataset_mix=[0.7, 0.3])
    assert (learnt.count(["A" + END]), learnt.count(["B" + END])) == (70, 30)
    assert "70.0% are a.jsonl's, 70 of its 70 samples" in caplog.text
    assert "30.0% are b.jsonl's, 30 of its 100 samples" in caplog.text


def test_a_mix_renames_columns_where_they_are_and_holds_the_limit_of_rows(prepare, caplog):
    write_rows("a.jsonl", [{"ask": f"a{i}", "completion": "A"} for i in range(70)])
    write_rows("b.jsonl", [{"messages": [user(f"b{i}"), said("B")]} for i in range(100)])
    names = ["a.jsonl", "b.jsonl"]
    flags = {"columns": ["prompt=ask"], "dataset_mix": [0.7, 0.3]}
    learnt = prepare(None, name=names, max_train_samples=10, **flags)
    assert (learnt.count(["A" + END]), learnt.count(["B" + END])) == (7, 3)
    with pytest.raises(InputError, match="--columns: a.jsonl b.jsonl has no column 'body'; found ask, "):
        prepare(None, name=["b.jsonl", "a.jsonl"][::-1], columns=["prompt=ask,text=body"])
    with pytest.raises(InputError, match="--dataset_mix: got 0.7 0.2; give shares whose sum is 1"):
        prepare(None, name=names, dataset_mix=[0.7, 0.2])
    with pytest.raises(InputError, match="--dataset_name: a.jsonl is named twice"):
        prepare(None, name=["a.jsonl", "a.jsonl"])
    with pytest.raises(InputError, match="--dataset_name: ./a.jsonl is named twice"):
        prepare(None, name=["a.jsonl", "./a.jsonl"])


def test_bad_rows_are_skipped_on_a_stream_too(run, prepare, tmp_path, monkeypatch):
    from tiny import save_model

    save_model("model")
    write_rows("rows.jsonl", [{"text": "Hello there" if i % 5 else None} for i in range(60)])
    flags = "--streaming True --bad_rows skip --max_steps 2 --do_train --max_seq_length 32 --output_dir out"
    run("sft.py", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl", *flags.split())
    assert json.loads(Path("out/all_results.json").read_text())["train_loss"] > 0
