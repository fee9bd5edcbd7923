"""Where data sets come from and what becomes of their rows. Run: pytest tests/test_data.py"""

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, write_rows
from tiny import make_tokenizer

from align.data import preparing
from align.data.loading import DataArguments, load_splits
from align.data.preparing import get_columns, prepare
from align.data.tokenization import SampleTokenizer, tokenize_samples
from align.errors import InputError

ROWS = [{"text": f"Hello number {number}, how are you today?"} for number in range(40)]


def load(name, do_eval=True, streams=False, folder="data/finetune", **arguments):
    return load_splits(DataArguments(dataset_name=str(name), **arguments), True, do_eval, streams, 0, folder)


def prepare_text(name, max_length=100, **arguments):
    args = DataArguments(dataset_name=str(name), **arguments)
    tokenizer = SampleTokenizer(make_tokenizer())
    tokenize = partial(tokenize_samples, tokenizer=tokenizer, max_length=max_length, truncation=args.truncation)
    rows = load_splits(args, True, False, False, 0, "data/finetune").train
    return prepare(rows, args, tokenize, f"{tokenizer.fingerprint} {max_length}")


def texts(rows):
    return [get_columns(row, {})["text"] for row in rows]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files_of_each_kind_are_read(suffix, tmp_path):
    file = tmp_path / f"rows.{suffix}"
    rows = datasets.Dataset.from_list(ROWS)
    {"jsonl": rows.to_json, "json": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[suffix](file)
    assert texts(load(file, do_eval=False).train) == [row["text"] for row in ROWS]


def test_an_existing_validation_split_is_used_and_nothing_is_cut_off(tmp_path, caplog):
    caplog.set_level("INFO")
    write_rows(tmp_path / "set/train.jsonl", ROWS)
    write_rows(tmp_path / "set/validation.jsonl", ROWS[:3])
    splits = load(tmp_path / "set", validation_split_percentage=10)
    assert (len(splits.train), texts(splits.validation)) == (40, [row["text"] for row in ROWS[:3]])
    assert f"validation: validation of {tmp_path / 'set'}; --validation_split_percentage has no effect" in caplog.text
    fewer = load(tmp_path / "set", max_train_samples=7, max_eval_samples=2)
    assert (texts(fewer.train), texts(fewer.validation)) == (texts(splits.train)[:7], texts(splits.validation)[:2])


def test_a_split_that_is_trained_on_is_not_its_own_validation(tmp_path):
    write_rows(tmp_path / "set/validation.jsonl", ROWS)
    splits = load(tmp_path / "set", split="validation", validation_split_percentage=10)
    assert sorted(texts(splits.train) + texts(splits.validation)) == sorted(row["text"] for row in ROWS)


def test_without_a_validation_split_the_same_rows_are_cut_off_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    first, second = (load(file, validation_split_percentage=10) for _ in range(2))
    assert (len(first.train), len(first.validation)) == (36, 4)
    assert texts(first.validation) == texts(second.validation)
    assert not set(texts(first.train)) & set(texts(first.validation))
    assert not [*(tmp_path / "cache").rglob("cache-*.arrow")], "each rank would write the same indices at each start"
    plain = datasets.Dataset.from_list(ROWS).train_test_split(test_size=4, seed=0)
    assert (texts(first.train), texts(first.validation)) == (plain["train"]["text"], plain["test"]["text"])


def test_the_conventional_folders_of_a_data_set_are_found(tmp_path):
    for part, rows in {"finetune": ROWS[:5], "rl": ROWS[5:12], "evaluation": ROWS[12:]}.items():
        write_rows(tmp_path / f"set/data/{part}/rows.jsonl", rows)
    splits = load(tmp_path / "set", folder="data/rl")
    assert (len(splits.train), len(splits.validation)) == (7, 28)
    assert len(load(tmp_path / "set", do_eval=False, subset="data/finetune").train) == 5
    assert len(load(tmp_path / "set", eval_subset="data/finetune").validation) == 5


def test_a_data_set_saved_to_disk_is_read(tmp_path):
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "set")
    assert len(load(tmp_path / "set", do_eval=False).train) == 40
    (tmp_path / "set/train/dataset_info.json").write_text("[]")
    with pytest.raises(InputError, match="set cannot be read: its dataset_info.json or state.json is damaged: .*list"):
        load(tmp_path / "set", do_eval=False)


def test_a_stream_cuts_its_first_rows_off_for_validation(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    splits = load(file, streaming=True, size_valid_set=4)
    assert texts(splits.validation) == [row["text"] for row in ROWS[:4]]
    assert len(list(splits.train)) == 36


def test_a_stream_is_shuffled_within_its_buffer_by_the_seed(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    in_order = [row["text"] for row in ROWS]

    arguments = {
        buffer: DataArguments(dataset_name=str(file), streaming=True, shuffle_buffer=buffer) for buffer in (1, 20)
    }
    orders = {
        (buffer, seed): texts(load_splits(arguments[buffer], True, False, True, seed, "data/finetune").train)
        for buffer, seed in ((1, 0), (20, 0), (20, 1), (20, 0))
    }

    assert orders[1, 0] == in_order != orders[20, 0] != orders[20, 1]
    assert sorted(orders[20, 0]) == sorted(in_order)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stream_of_which_validation_takes_every_row_names_the_flag_that_cuts_it_off(suffix, tmp_path):
    file, rows = tmp_path / f"rows.{suffix}", datasets.Dataset.from_list(ROWS)
    {"jsonl": rows.to_json, "parquet": rows.to_parquet}[suffix](file)
    with pytest.raises(InputError, match="--size_valid_set: the first 40 rows .* leave none .*; give less, or"):
        load(file, streaming=True, size_valid_set=40)
    assert len(list(load(file, streaming=True, size_valid_set=39).train)) == 1
    arguments = DataArguments(dataset_name=str(file), streaming=True)
    assert len(list(load_splits(arguments, False, True, False, 0, "data/finetune").validation)) == 40


def test_rows_that_were_prepared_before_come_from_the_cache_until_anything_changes(tmp_path, monkeypatch):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    first = prepare_text(file).rows.cache_files[0]["filename"]
    assert prepare_text(file).rows.cache_files[0]["filename"] == first
    assert prepare_text(file, max_length=5).rows.cache_files[0]["filename"] != first
    for name in ("preparing", "files", "formats", "chats", "tokenization"):
        changed = Path(shutil.copytree(Path(preparing.__file__).parent, tmp_path / name))
        (changed / f"{name}.py").write_text("# other code")
        with monkeypatch.context() as patch:
            patch.setattr(preparing, "__file__", str(changed / "preparing.py"))
            assert prepare_text(file).rows.cache_files[0]["filename"] != first, name
    write_rows(file, [*ROWS[:-1], {"text": "changed"}])
    assert prepare_text(file).rows.cache_files[0]["filename"] != first


def test_bad_rows_can_be_skipped_up_to_a_share_and_are_counted(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"text": ""}])
    assert prepare_text(file, bad_rows="skip").dropped == {"bad row: column `text` is empty": 1}
    file.write_bytes(file.read_bytes().replace(b"number 3,", b"\xff") + b'{"text": 5}\n{"te')
    assert sum(prepare_text(file, bad_rows="skip", max_bad_rows=0.2).dropped.values()) == 4
    with pytest.raises(InputError, match="4 of 43 rows are bad, more than --max_bad_rows 0.09"):
        prepare_text(file, bad_rows="skip", max_bad_rows=0.09)


def test_the_files_that_a_card_names_are_read_as_files_are_and_anew_where_one_is_replaced(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.csv\n---\n"
    (tmp_path / "README.md").write_text(card)
    write_rows(tmp_path / "b.jsonl", ROWS)
    for text in ("2024-01-02", "2024-01-03"):
        (tmp_path / "a.csv").write_text(f"text\n{text}\n")
        os.utime(tmp_path / "a.csv", (1, 1))
        assert texts(load(tmp_path, do_eval=False).train) == [text]


def test_what_a_card_says_about_reading_its_files_is_used(tmp_path):
    (tmp_path / "README.md").write_text("---\nconfigs: [{config_name: default, data_files: a.csv, sep: '|'}]\n---\n")
    (tmp_path / "a.csv").write_text("text|number\nHello, there|1\n")
    assert load(tmp_path, do_eval=False).train[0] == {"text": "Hello, there", "number": 1}


@pytest.mark.parametrize("kind", ["parquet", "disk", "memory"])
def test_typed_rows_of_the_same_time_and_size_are_read_anew(kind, monkeypatch, tmp_path):
    found = []
    for text in ("Hello", "Howdy"):
        folder = tmp_path / (text if kind == "memory" else "set")
        rows = datasets.Dataset.from_list([{"text": text}])
        if kind == "parquet":
            rows.to_parquet(tmp_path / "rows.parquet")
            os.utime(tmp_path / "rows.parquet", (1, 1))
            found.append(prepare_text(tmp_path / "rows.parquet").rows["input_ids"])
        else:
            monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 10**9 if kind == "memory" else 0)
            datasets.Dataset(rows.data, fingerprint=None if kind == "memory" else "the same").save_to_disk(folder)
            found.append(prepare_text(folder).rows["input_ids"])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ("[1", "README.md: while parsing a flow sequence .*; name a file or a folder inside"),
        (
            "[{config_name: a, data_files: a.csv}, {config_name: b, data_files: a.csv}]",
            r"configs: \['a', 'b'\]; name a",
        ),
    ],
)
def test_a_card_that_does_not_say_what_to_read_is_one_line(configs, message, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    (tmp_path / "a.csv").write_text("text\nHello\n")
    with pytest.raises(InputError, match=message):
        load(tmp_path, do_eval=False)


def test_dates_of_parquet_are_text_in_a_folder_of_several_kinds_and_bytes_are_not(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    datasets.Dataset.from_list([{"text": datetime.date(2020, 1, 2)}]).to_parquet(tmp_path / "rows.parquet")
    assert len(prepare_text(tmp_path).rows) == len(ROWS) + 1
    datasets.Dataset.from_list([{"text": b"Hello"}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="rows.parquet, row 1: column `text` is dict .*bytes"):
        prepare_text(tmp_path)


@pytest.mark.parametrize("late", [False, True])
def test_whole_numbers_and_fractions_are_one_type(late, tmp_path):
    rows = [{**ROWS[0], "score": number if (number < 1500 if late else number % 2) else 0.5} for number in range(2000)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert prepare_text(file).dropped == prepare_text(file, bad_rows="skip").dropped == {}


def test_a_line_that_is_no_row_is_named_before_one_of_another_type(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{**ROWS[0], "score": score} for score in (1, 0.5, "a")])
    file.write_bytes(file.read_bytes() + b'{"text": "half')
    with pytest.raises(InputError, match="rows.jsonl, row 4: not JSON: Unterminated string"):
        prepare_text(file)
    assert prepare_text(file, bad_rows="skip", max_bad_rows=0.5).dropped == {
        "bad row: not JSON: Unterminated string starting": 1,
    }


def test_a_column_that_nobody_asks_for_may_hold_anything(tmp_path):
    scores = [1, 0.5, "a", None, ["b"], "2020-01-01", {"c": 1}, "NA"]
    file = write_rows(tmp_path / "rows.jsonl", [{**ROWS[0], "score": score} for score in scores])
    assert prepare_text(file).dropped == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows.jsonl is empty"),
        (b'{"text": "a"}\n{"text": \n', "rows.jsonl, row 2: not JSON"),
        (b'{"text": "a"}\n{"text": "\xff\xfe"}\n', "rows.jsonl, row 2: not UTF-8 at byte"),
        (b'{"text": "a"}\n{"text": 5}\n', "row 2: column `text` is int '5', not text"),
        (b'{"text": "a"}\n{"text": null}\n', "row 2: column `text` is missing, not text .--bad_rows skip"),
        (b'{"foo": "a"}\n', "the columns foo make no known format"),
    ],
    ids=["empty", "half JSON", "UTF-8", "types", "null", "columns"],
)
def test_a_bad_file_is_refused_with_the_row_and_the_reason(content, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare_text(file)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("missing.jsonl", {}, "no such file or folder: missing.jsonl"),
        ("rows.txt", {}, "ends in '.txt'; known are .jsonl"),
        ("rows.jsonl", {"split": "big"}, "--split: 'big' is not in rows.jsonl; found train"),
        (".", {"subset": "data/none"}, "--subset: . has no folder 'data/none'"),
        (".", {"eval_subset": "data/none", "do_eval": True}, "--eval_subset: . has no folder 'data/none'"),
        ("rows.jsonl", {"validation_split_percentage": 0}, "--validation_split_percentage: got 0"),
        ("rows.jsonl", {"streaming": True, "size_valid_set": 0}, "--size_valid_set: got 0; give 1 or more"),
    ],
)
def test_what_cannot_be_found_is_named_with_its_flag(name, arguments, message, tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "rows.txt").write_text("a")
    with pytest.raises(InputError, match=message):
        load(name, **arguments)


def test_a_name_on_the_hub_that_cannot_be_reached_says_so(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="--dataset_name: someone/something is not a file or folder"):
        load("someone/something")


def test_preparing_in_several_processes_gives_the_same_rows(tmp_path):
    rows = [{"text": f"Hello {number} " + json.dumps(number)} for number in range(3000)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    parallel, single = prepare_text(file, num_workers=2).rows, prepare_text(file, num_workers=1, max_length=101).rows
    assert parallel["input_ids"] == single["input_ids"]


def test_processes_that_prepare_data_end_with_the_one_that_started_them(tmp_path):
    code = """
import os, signal, sys, time
from datasets import Dataset
from align.data.preparing import EndingForks
def wait(row):
    open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
    if len(os.listdir(sys.argv[1])) == 2: os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)
with EndingForks(): Dataset.from_dict({"number": [1, 2]}).map(wait, num_proc=2)"""
    notes = tmp_path / "notes"
    notes.mkdir()

    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ended = subprocess.run([sys.executable, "-c", code, str(notes)], cwd=ROOT, check=False, **silent)

    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while left := [path.name for path in notes.iterdir() if is_alive(path.name)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def is_alive(pid):
    """Not where it waits for somebody to take note of its end."""
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
