"""Labels, BOS, EOS and templates for every kind of tokenizer. Run: pytest tests/test_tokenization.py"""

import json
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest
from tiny import TOKENIZERS, make_tokenizer
from tokenizers.processors import TemplateProcessing

from align.data.formats import Sample
from align.data.tokenization import (
    IGNORED,
    LOST_PROMPT_END,
    LOST_START,
    SampleTokenizer,
    encode_prompt,
    set_chat_template,
    tokenize_pairs,
    tokenize_samples,
)
from align.errors import InputError

CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "Thank you"},
    {"role": "assistant", "content": "Hello there "},
]
QUESTION = Sample("Question: What is two?\n\nAnswer: ", ("It is Paris.", "London"))


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return make_tokenizer(request.param)


def encode(tokenizer, sample, answer=0, **options):
    samples = SampleTokenizer(tokenizer, **options)
    return samples.encode([samples.render(sample, answer)])[0][:2]


def test_text_begins_with_the_bos_that_the_model_expects_and_ends_with_a_learnt_eos(tokenizer):
    ids, learnt = encode(tokenizer, QUESTION)
    asked = encode_prompt(tokenizer, QUESTION.prompt)
    assert list(ids[: len(asked)]) == asked
    assert not learnt[: len(asked)].any()
    assert learnt[len(asked) :].all()
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == QUESTION.prompt + "It is Paris."
    assert ids[-1] == tokenizer.eos_token_id
    short, _ = encode(tokenizer, Sample("Hello", ("you",)))
    assert tokenizer.decode(short, skip_special_tokens=True).strip() == "Helloyou"


def test_the_loss_is_on_the_answer_and_its_end_alone(tokenizer):
    ids, learnt = encode(tokenizer, QUESTION)
    assert tokenizer.decode(ids[learnt]).strip() == "It is Paris." + tokenizer.eos_token
    assert tokenizer.decode(ids[~learnt], skip_special_tokens=True).strip() == QUESTION.prompt.strip()


def test_a_chat_has_one_bos_and_teaches_every_turn_of_the_assistant_with_its_end(tokenizer):
    if tokenizer.chat_template is None:
        set_chat_template(tokenizer, "plain")
    ids, learnt = encode(tokenizer, Sample([], (CHAT,)))
    turns = [tokenizer.decode(ids[run]).strip() for run in np.split(np.arange(len(ids)), _edges(learnt))[1::2]]
    assert [
        turn.split(".")[0].startswith(said) for turn, said in zip(turns, ("It is four", "Hello there"), strict=True)
    ]
    assert all(any(turn.endswith(token) for token in tokenizer.all_special_tokens) for turn in turns)
    assert ids[-1] == tokenizer.eos_token_id
    assert ids[-2] != tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None and tokenizer.bos_token != tokenizer.eos_token:
        assert ids[0] == tokenizer.bos_token_id
        assert ids[1] != tokenizer.bos_token_id


def _edges(learnt):
    return np.flatnonzero(np.diff(learnt)) + 1


def test_a_run_is_the_same_run_on_the_day_after_though_its_chat_template_writes_the_day(monkeypatch):
    class Clock(datetime):
        now = classmethod(lambda cls, tz=None: datetime(2026, 1, days[-1]))
        today = classmethod(lambda cls: date(2026, 1, days[-1]))

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    for name in ("date", "datetime"):
        monkeypatch.setattr(f"align.data.tokenization.{name}", Clock, raising=False)
    found, days = [], []
    for day in (3, 4):
        days.append(day)
        tokenizer = make_tokenizer("llama-3")
        tokenizer.chat_template = "{{ strftime_now('%d') }}" + tokenizer.chat_template
        found.append((SampleTokenizer(tokenizer).fingerprint, tokenizer.decode(encode_prompt(tokenizer, CHAT[:1]))[:2]))
    assert [shown for _, shown in found] == ["03", "04"]
    assert found[0][0] == found[1][0]


def test_the_plain_template_needs_no_token_that_the_model_has_never_seen(tokenizer):
    before = len(tokenizer)
    set_chat_template(tokenizer, "plain")
    ids, learnt = encode(tokenizer, Sample([], (CHAT,)))
    assert len(tokenizer) == before
    assert tokenizer.decode(ids[learnt]).count(tokenizer.eos_token) == 2


def test_chosen_and_rejected_share_the_ids_of_their_prompt(tokenizer):
    columns, reasons, _ = tokenize_pairs([QUESTION], SampleTokenizer(tokenizer), 50, 100, "keep_start")
    prompt, chosen, rejected = (columns[f"{name}_input_ids"][0] for name in ("prompt", "chosen", "rejected"))
    whole = [list(encode(tokenizer, QUESTION, answer)[0]) for answer in (0, 1)]
    assert [[*prompt, *chosen], [*prompt, *rejected]] == whole
    assert reasons == [None]


def test_training_on_the_prompt_learns_all_but_what_nothing_predicts(tokenizer):
    samples = SampleTokenizer(tokenizer, train_on_prompt=True)
    columns, _, _ = tokenize_samples([QUESTION], samples, 100, "keep_start")
    assert list(columns["labels"][0]) == [IGNORED, *columns["input_ids"][0][1:]]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
def test_truncation_never_leaves_a_sample_without_a_label(truncation):
    samples = SampleTokenizer(make_tokenizer())
    long = [Sample("Hello there " * 20, ("fine",)), Sample("Hi", (" thank you" * 20,)), Sample("Hi", (" you",))]
    columns, reasons, _ = tokenize_samples(long, samples, 12, truncation)
    kept = [index for index, reason in enumerate(reasons) if reason is None]
    assert kept == {"keep_start": [1, 2], "keep_end": [0, 1, 2], "drop": [2]}[truncation]
    for index in kept:
        assert columns["length"][index] <= 12
        assert columns["trained"][index] == (columns["labels"][index] != IGNORED).sum() > 0
        assert columns["input_ids"][index][0] == samples.tokenizer.bos_token_id


def test_pairs_are_cut_to_their_limits_in_tokens_and_the_same_twice_is_dropped():
    samples = SampleTokenizer(make_tokenizer())
    same_start = Sample("Hello " * 30, ("there " * 20 + "a", "there " * 20 + "b"))
    columns, reasons, _ = tokenize_pairs([same_start, QUESTION, Sample("Hi", ("a", "a"))], samples, 10, 16, "keep_end")
    assert len(columns["prompt_input_ids"][0]) == 10
    assert max(len(ids) for ids in columns["chosen_input_ids"]) == 6
    assert reasons == ["chosen and rejected are the same after truncation", None, "chosen and rejected are the same"]


def test_a_prompt_that_is_cut_keeps_its_bos_and_the_end_that_was_asked_for():
    samples = SampleTokenizer(make_tokenizer())
    whole = encode_prompt(samples.tokenizer, "Hello there how are you")
    pair = Sample("Hello there how are you", (" fine", " four"))

    cut = {way: tokenize_pairs([pair], samples, 4, 50, way) for way in ("keep_start", "keep_end", "drop")}

    prompts = {way: list(columns["prompt_input_ids"][0]) for way, (columns, _, _) in cut.items()}
    assert len(whole) > 5
    assert whole[0] == samples.tokenizer.bos_token_id
    assert prompts["keep_start"] == whole[:4]
    assert prompts["keep_end"] == [whole[0], *whole[-3:]]
    assert [cut[way][1] for way in cut] == [[None], [None], ["prompt longer than --max_prompt_length"]]
    assert [cut[way][2] for way in ("keep_start", "keep_end")] == [[(LOST_PROMPT_END,)], [(LOST_START,)]]
    long = Sample("Hi", (" thank you" * 20, " no"))
    assert tokenize_pairs([long], samples, 10, 16, "drop")[1] == ["pair longer than --max_length"]


def test_an_end_that_the_tokenizer_adds_is_no_part_of_a_prompt():
    tokenizer = make_tokenizer("llama-2")
    asked = encode_prompt(tokenizer, "Hello there")
    bos, eos = ((token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[bos, eos])

    assert tokenizer("Hello there").input_ids == [*asked, eos[1]]
    assert encode_prompt(tokenizer, "Hello there") == asked


def test_chatml_without_its_tokens_names_the_template_that_needs_none():
    with pytest.raises(InputError, match="no <|im_end|>; use plain"):
        set_chat_template(make_tokenizer("llama-2"), "chatml")
    with pytest.raises(InputError, match="'nowhere.jinja' is not a file; name one, or choose from plain, chatml"):
        set_chat_template(make_tokenizer("llama-2"), "nowhere.jinja")


TEMPLATE = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jinja", b"\xef\xbb\xbf" + TEMPLATE.encode()),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE}, indent=1).encode()),
        ("old.json", json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]}).encode()),
        ("plain.json", TEMPLATE.encode()),
    ],
)
def test_a_chat_template_may_stand_in_files_of_several_kinds(name, content):
    Path(name).write_bytes(content)
    tokenizer = make_tokenizer("llama-2")
    set_chat_template(tokenizer, name)
    assert tokenizer.chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jinja", b"", "empty.jinja holds no template of `messages`"),
        ("notes.txt", b"Be kind.", "notes.txt holds no template of `messages`"),
        ("utf16.jinja", TEMPLATE.encode("utf-16"), "utf16.jinja cannot be read: .*utf-8"),
        ("open.jinja", b"{% for m in messages %}\n{{ m ", "open.jinja, line 2: "),
        ("list.json", b"[1]", "list.json holds no template of `messages`"),
        ("half.json", b'{"chat', "half.json cannot be read: "),
        ("tokenizer_config.json", b'{"bos_token": "a"}', "tokenizer_config.json holds no template of `messages`"),
    ],
)
def test_a_file_that_is_no_chat_template_is_refused(name, content, message):
    Path(name).write_bytes(content)
    with pytest.raises(InputError, match=f"--chat_template: {message}"):
        set_chat_template(make_tokenizer("llama-2"), name)
