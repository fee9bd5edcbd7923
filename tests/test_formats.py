"""The formats that columns make. Run: pytest tests/test_formats.py"""

import json

import pytest

from align.errors import InputError
from align.formats import FORMATS, RowError, Sample, recognise

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_the_example_of_each_format_is_recognised_and_read(format):
    row = json.loads(format.example)
    assert recognise(list(row), preference=format.preference) == format
    assert len(format.read(row).answers) == (2 if format.preference else 1)


def test_fine_tuning_learns_the_chosen_answer_of_preference_data():
    format = recognise(["question", "response_j", "response_k"], preference=False)
    sample = format.read({"question": "2 + 2?", "response_j": "4", "response_k": "5"})
    assert (sample.prompt, sample.answers[0]) == ("Question: 2 + 2?\n\nAnswer: ", "4")


def test_preference_rows_may_also_hold_messages_without_being_ambiguous():
    columns = ["prompt", "chosen", "rejected", "messages"]
    assert recognise(columns, preference=True).name == "preference"
    assert recognise(columns, preference=False).name == "messages"


def test_columns_that_fit_two_formats_name_both_and_the_flag_that_chooses():
    with pytest.raises(InputError, match="fit text and messages; choose one with --data_format"):
        recognise(["text", "messages"], preference=False)
    assert recognise(["text", "messages"], preference=False, name="text").name == "text"


def test_unknown_columns_are_named_beside_the_known_formats_with_examples():
    with pytest.raises(InputError, match=r"columns foo, bar make no known format.*Once upon.*question \+ response_j"):
        recognise(["foo", "bar"], preference=False)


@pytest.mark.parametrize(
    ("row", "sample"),
    [
        ({"prompt": "Q:", "chosen": "Q: yes", "rejected": " no"}, Sample("Q:", (" yes", " no"))),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [ANSWER]}, Sample([USER], ([ANSWER], [ANSWER]))),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [USER, ANSWER]}, Sample([USER], ([ANSWER], [ANSWER]))),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, Sample([USER], ([ANSWER], [ANSWER]))),
    ],
    ids=["text", "text prompt", "messages", "no prompt column"],
)
def test_a_prompt_repeated_in_the_answers_counts_once(row, sample):
    assert recognise(list(row), preference=True).read(row) == sample


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "not a list of messages"),
        ("Hi", "str 'Hi', not a list"),
        ([USER, USER], "message 2: role 'user' after 'user' is out of order"),
        ([ANSWER, {"role": "system", "content": "x"}], "role 'system' after 'assistant'"),
        ([{"role": "user"}], "message 1: `content` is missing"),
        ([{"role": "robot", "content": "x"}], "role 'robot' is none of"),
        ([USER], "no assistant turn"),
        ([USER, None], "message 2 is missing"),
    ],
)
def test_bad_messages_say_which_one_and_why(messages, reason):
    with pytest.raises(RowError, match=reason):
        recognise(["messages"], preference=False).read({"messages": messages})


@pytest.mark.parametrize(
    ("row", "reason"), [({"text": None}, "missing"), ({"text": 3}, "int '3', not text"), ({"text": " \n"}, "empty")]
)
def test_bad_text_says_what_it_is(row, reason):
    with pytest.raises(RowError, match=f"column `text` is {reason}"):
        recognise(["text"], preference=False).read(row)
