"""A model is asked with the very ids that it was trained behind. Run: pytest tests/test_asked_as_trained.py

Each template below has a property that parts training from asking where two places decide about ids.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from tiny import make_tokenizer, save_model

from align.data.formats import Sample
from align.data.tokenization import CHAT_TEMPLATES, SampleTokenizer, encode_prompt

LOOP = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}"
# property: (tokenizer, template)
TEMPLATES = {
    "our plain one": ("gpt2", CHAT_TEMPLATES["plain"]),
    "a blank of its own behind [/INST]": (
        "gpt2",
        LOOP + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST] ' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}",
    ),
    "a blank of its own behind ASSISTANT:": (
        "gpt2",
        LOOP + "{{ m['role'].upper() + ': ' + m['content'] }}{{ eos_token if m['role'] == 'assistant' else ' ' }}"
        + ASK + "{{ 'ASSISTANT: ' }}{% endif %}",
    ),
    "an empty block of thoughts before an answer": (
        "qwen",
        LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ '<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '' }}{{ m['content'] + '<|im_end|>\n' }}"
        + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "an empty block of thoughts that is asked with": (
        "qwen",
        LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        + ASK + "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}",
    ),
    "no BOS on a tokenizer that adds one": (
        "mistral",
        LOOP + "{{ m['role'] + ': ' + m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}"
        + ASK + "{{ 'assistant:' }}{% endif %}",
    ),
    "an answer that is stripped and wrapped": (
        "llama-3",
        LOOP + "{{ '<|start|>' + m['role'] + '<|stop|>' }}"
        "{{ '[' + m['content'].strip() + ']' if m['role'] == 'assistant' else m['content'] }}{{ '<|eot|>' }}"
        + ASK + "{{ '<|start|>assistant<|stop|>' }}{% endif %}",
    ),
    "a generation prompt that begins a thought": (
        "qwen",
        LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] + '<|im_end|>\n' }}"
        + ASK + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    ),
    "other blanks where it asks": (
        "gpt2",
        LOOP + "{{ m['role'].upper() + ':   ' + m['content'] + eos_token + '\n\n' }}"
        + ASK + "{{ '  ASSISTANT:\n' }}{% endif %}",
    ),
    "a thought that is asked for and closed at once": (
        "qwen",
        LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + ('<think></think>' if m['role'] == 'assistant' else '') }}"
        "{{ m['content'] + '<|im_end|>\n' }}" + ASK + "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    ),
    "content as a list of parts alone": (
        "qwen",
        LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
        "{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}"
        + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
}  # fmt: skip
FACTS = {"What is two and two?": "It is four", "What is France?": "Paris of course", "Hello": "Hello there, you"}
THOUGHTS = "<think>\nso\n</think>\n\n"
SAID = {"a generation prompt that begins a thought": THOUGHTS}  # in front of the answers in the rows


def write_facts(property):
    """Chats whose answers are the facts."""
    lead = SAID.get(property, "")
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": lead + said}]}
        for asked, said in FACTS.items()
    ]
    return write_rows("facts.jsonl", rows)


@pytest.mark.parametrize("property", TEMPLATES)
def test_what_stands_before_the_first_learnt_token_is_what_the_template_asks_with(property):
    kind, template = TEMPLATES[property]
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = template
    samples = SampleTokenizer(tokenizer)
    for asked, said in FACTS.items():
        messages = [{"role": "user", "content": asked}]
        rendering = samples.render(
            Sample(messages, ([{"role": "assistant", "content": SAID.get(property, "") + said}],))
        )
        ids, learnt, size = samples.encode([rendering])[0]
        before = ids[: int(np.argmax(learnt))].tolist()
        assert before == encode_prompt(tokenizer, messages)
        if "parts" in property:
            messages[0]["content"] = [{"type": "text", "text": asked}]
        assert before == tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert size == len(before)
        assert said in tokenizer.decode(ids[learnt])
        assert ids[-1] == tokenizer.eos_token_id
        assert learnt[-1]


@pytest.fixture
def teach_and_ask(run):
    """Trains a model on `rows` to the end and returns what it says to the prompts."""

    def teach_and_ask(kind, template, rows, prompts, *flags):
        # a vocabulary whose texts are told apart, and large first weights: the facts are learnt in seconds
        save_model("model", tokenizer=kind, initializer_range=0.1)
        Path("model/chat_template.jinja").write_text(template or "")
        training = (
            "--use_peft False --do_train --max_seq_length 128 --max_steps 50 --learning_rate 4e-3 --warmup_ratio 0.1"
        )
        training += " --per_device_train_batch_size 1 --logging_steps 50 --save_strategy no --disable_tqdm True"
        run("sft.py", "--model_name_or_path", "model", "--dataset_name", rows, "--output_dir", "out", *training.split())
        asking = ["--max_new_tokens", 24, "--output_dir", "said", *flags]
        run("run_generation.py", "--model_name_or_path", "out", "--prompt", *prompts, *asking)
        lines = Path("said/generations.jsonl").read_text().splitlines()
        return [json.loads(line)["text"].strip() for line in lines]

    return teach_and_ask


def test_no_token_holds_characters_of_a_later_turn_and_of_what_it_is_asked_with():
    kind, template = TEMPLATES["a blank of its own behind ASSISTANT:"]
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = template
    assert len(tokenizer(" you").input_ids) == 1
    messages = [{"role": role, "content": "you"} for role in ("user", "assistant") * 3]
    samples = SampleTokenizer(tokenizer)
    ids, learnt, _ = samples.encode([samples.render(Sample([], (messages,)))])[0]
    starts, ends = (np.flatnonzero(np.diff(learnt.astype(int), prepend=0, append=0) == step) for step in (1, -1))
    assert [tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)] == [
        "you<|endoftext|>"
    ] * 3
    asked = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)
    assert ids[starts[1] - 1] == asked[-1] == tokenizer.convert_tokens_to_ids("Ġ")
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)


LIKE_OTHERS = (
    "content as a list of parts alone",
    "other blanks where it asks",
    "a thought that is asked for and closed at once",
)


@pytest.mark.parametrize(
    "property", [pytest.param(each, marks=pytest.mark.soak) if each in LIKE_OTHERS else each for each in TEMPLATES]
)
def test_facts_that_were_learnt_as_chats_are_said_when_asked(property, teach_and_ask):
    kind, template = TEMPLATES[property]
    said = teach_and_ask(kind, template, write_facts(property), FACTS, "--use_chat_template")
    assert [text.strip("[]").rpartition("</think>")[2].strip() for text in said] == list(FACTS.values())


TEXTS = {
    "prompt-completion": (lambda asked, said: {"prompt": f"Q: {asked} A:", "completion": f" {said}"}, "Q: {} A:"),
    "instruction": (
        lambda asked, said: {"instruction": asked, "output": said},
        "### Instruction:\n{}\n\n### Response:\n",
    ),
    "question-answer": (lambda asked, said: {"question": asked, "answer": said}, "Question: {}\n\nAnswer: "),
}


@pytest.mark.parametrize("format", TEXTS)
@pytest.mark.parametrize("kind", ["gpt2", pytest.param("mistral", marks=pytest.mark.soak)])
def test_facts_that_were_learnt_as_text_are_said_when_asked(format, kind, teach_and_ask):
    make_row, wording = TEXTS[format]
    rows = write_rows("facts.jsonl", [make_row(asked, said) for asked, said in FACTS.items()])
    said = teach_and_ask(kind, None, rows, [wording.format(asked) for asked in FACTS])
    assert said == list(FACTS.values())
