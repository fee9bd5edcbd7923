"""The formats that columns make. Run: pytest tests/test_formats.py"""

import json

import pytest
from show_formats import PAGE, make_page

from align.data.formats import FORMATS, RowError, Sample, recognise
from align.errors import InputError

SYSTEM = {"role": "system", "content": "Be kind."}
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
QUESTION, OTHER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_the_example_of_each_format_is_recognised_and_read(format):
    row = json.loads(format.example)
    assert recognise(list(row), preference=format.preference) == format
    assert len(format.read(row).answers) == (2 if format.preference else 1)


def test_the_page_of_formats_shows_what_is_learnt_and_refused():
    assert PAGE.read_text(encoding="utf-8") == make_page(), "make formats"


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
        (
            {"prompt": "Is it?", "chosen": "Is it? yes", "rejected": "Is it? no"},
            Sample("Is it?", (" yes", " no"), notes=("the prompt, which the answers repeat, counts once",)),
        ),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [ANSWER]}, Sample([USER], ([ANSWER], [ANSWER]))),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [USER, ANSWER]}, Sample([USER], ([ANSWER], [ANSWER]))),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, Sample([USER], ([ANSWER], [ANSWER]))),
    ],
    ids=["text", "text prompt", "messages", "no prompt column"],
)
def test_a_prompt_repeated_in_the_answers_counts_once(row, sample):
    assert recognise(list(row), preference=True).read(row) == sample


@pytest.mark.parametrize(
    ("prompt", "told", "whole"),
    [
        ("Hi\n", [USER], [USER]),
        ([USER], [SYSTEM, USER], [SYSTEM, USER]),
        ("Who? ", [USER, ANSWER, QUESTION], [USER, ANSWER, QUESTION]),
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ([USER, ANSWER], [QUESTION], [USER, ANSWER, QUESTION]),
        ([USER, ANSWER, USER], [USER, ANSWER, USER], [USER, ANSWER, USER]),
        ("Who?", [], [QUESTION]),
    ],
    ids=["blanks", "system", "history", "system alone", "history alone", "the same twice", "nothing"],
)
def test_answers_may_tell_more_of_the_conversation_than_the_prompt(prompt, told, whole):
    row = {"prompt": prompt, "chosen": [*told, ANSWER, QUESTION, OTHER], "rejected": [*told, OTHER]}
    sample = recognise(list(row), preference=True).read(row)
    assert sample == Sample(whole, ([ANSWER, QUESTION, OTHER], [OTHER]))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "reason"),
    [
        ("Bye", [USER, ANSWER], [USER, OTHER], "`chosen` neither repeats nor follows the prompt: role 'user' after"),
        ([USER], [ANSWER], [SYSTEM, QUESTION, OTHER], "`rejected` neither .* role 'system' after 'user'"),
        ([USER, ANSWER], [OTHER, QUESTION, OTHER], [OTHER], "role 'assistant' after 'assistant'"),
        ([USER, ANSWER], [USER, ANSWER], [USER, OTHER], "`chosen` has no answer behind the prompt"),
        ([USER], [SYSTEM, USER, ANSWER], [USER, OTHER], "chosen and rejected do not answer the same prompt"),
        (None, [USER, ANSWER, USER, ANSWER], [USER, ANSWER, QUESTION, OTHER], "do not answer the same prompt"),
        (None, [USER, ANSWER], [QUESTION, ANSWER], "there is no prompt"),
    ],
    ids=["another prompt", "another in one", "two answers", "no answer", "more in one", "other turns", "not shared"],
)
def test_answers_that_do_not_fit_the_prompt_say_why(prompt, chosen, rejected, reason):
    with pytest.raises(RowError, match=reason):
        recognise(["chosen", "rejected"], True).read({"prompt": prompt, "chosen": chosen, "rejected": rejected})


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
