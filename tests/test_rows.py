"""Rows as they come: what is learnt of them, what is told, what is refused. Run: pytest tests/test_rows.py"""

import gzip
import json
import logging
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from conftest import write_rows
from tiny import make_tokenizer

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
NO_SYSTEM = TOOLS_TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


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
        training = SimpleNamespace(do_train=True, do_eval=False, max_steps=0, seed=0)
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
        ["context + question + answers", "columns not used: title"],
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
    "parts of text and a developer": (
        {"messages": [{"role": "developer", "content": "D"}, user([{"type": "text", "text": "Hi"}]), said("Yo")]},
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
    "two system prompts": (
        {"messages": [{"role": "system", "content": "A"}, user("b"), said("c")], "system": "B"},
        {},
        "two different system prompts",
    ),
    "an image": ({"messages": [user([{"type": "image"}]), said("b")]}, {}, "a part that is no text but 'image'"),
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


def test_rows_that_all_fail_alike_are_not_skipped(prepare):
    with pytest.raises(InputError, match=r"row 1: column `messages` .* \(as all of the first 20 rows\)"):
        prepare([{"messages": "x"}] * 20, bad_rows="skip", max_bad_rows=1)


def test_columns_are_renamed(prepare):
    rows = [{"ask": "P?", "good": "C", "bad": "D"}]
    renamed = prepare(rows, preference=True, columns=["prompt=ask,chosen=good", "rejected=bad"])
    assert renamed == [(["C" + END], ["D" + END])]


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


@pytest.mark.parametrize("name", FILES)
def test_text_stays_text_in_files_of_any_kind(name, prepare):
    Path(name).write_bytes(FILES[name])
    assert prepare(None, name=name) == [["NA" + END], ["True" + END]]


def test_a_folder_of_several_kinds_of_files_is_read_whole(prepare):
    Path("both").mkdir()
    write_rows("both/a.jsonl", [{"prompt": "a", "completion": "A"}])
    Path("both/b.csv").write_text("prompt,completion\nb,B\n")
    assert sorted(prepare(None, name="both")) == [["A" + END], ["B" + END]]


def test_data_sets_are_mixed_by_their_shares_each_in_its_own_format(prepare, caplog):
    write_rows("a.jsonl", [{"prompt": f"a{i}", "completion": "A"} for i in range(70)])
    write_rows("b.jsonl", [{"messages": [user(f"b{i}"), said("B")]} for i in range(100)])
    learnt = prepare(None, name=["a.jsonl", "b.jsonl"], dataset_mix=[0.7, 0.3])
    assert (learnt.count(["A" + END]), learnt.count(["B" + END])) == (70, 30)
    assert "70.0% are a.jsonl's, 70 of its 70 samples" in caplog.text
    assert "30.0% are b.jsonl's, 30 of its 100 samples" in caplog.text


def test_bad_rows_are_skipped_on_a_stream_too(run, prepare, tmp_path, monkeypatch):
    from tiny import save_model

    save_model("model")
    write_rows("rows.jsonl", [{"text": "Hello there" if i % 5 else None} for i in range(60)])
    flags = "--streaming True --bad_rows skip --max_steps 2 --do_train --max_seq_length 32 --output_dir out"
    run("sft.py", "--model_name_or_path", "model", "--dataset_name", "rows.jsonl", *flags.split())
    assert json.loads(Path("out/all_results.json").read_text())["train_loss"] > 0
