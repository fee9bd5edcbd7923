"""Writes docs/formats.md: a row of each format, what is learnt of it, and what is refused. Run: make formats"""

import json
import sys
from pathlib import Path

from tiny import make_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from align.data.formats import FORMATS, RowError, read_label, recognise
from align.data.tokenization import CHAT_TEMPLATES, SampleTokenizer

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
START = """# Formats

A row of each format, and the text that a model sees of it, in the wording of `--chat_template plain`. Green is learnt;
of pairs, red is what the model learns to say less. Nothing else gives a loss. (A line break in front of a colour is not
in the text.) `make formats` writes this page, and a test holds it to what is done.
"""
REFUSED = [
    {"prompt": "2 + 2 =", "completion": None},
    {"prompt": "2 + 2 =", "completion": 4},
    {"prompt": "2 + 2 =", "completion": "5", "label": False},
    {"instruction": "Add.", "output": "4", "history": [["1 + 1"]]},
    {"messages": []},
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "friend", "content": "Hello!"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!", "weight": 0.5}]},
    {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A cat."}]},
    {"question": "What is 2 + 2?", "answers": {"text": []}},
    {"system": "Be brief.", "input": "2 + 2?", "chosen": "4", "rejected": "Five."},
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!", "rejected": "\n\nHuman: Ho\n\nAssistant: What?"},
    {"instruction": "Add.", "completions": [{"response": "4", "overall_score": 9}] * 2},
]


def show(samples: SampleTokenizer, sample) -> list[str]:
    """The lines of a diff: as they are, learnt (+), or of a rejected answer (-)."""
    lines = []
    for number, mark in zip(range(len(sample.answers)), "+-", strict=False):
        rendering = samples.render(sample, number)
        pieces, end = [(" ", rendering.prompt)] if number == 0 else [], 0
        for start, stop in rendering.spans:
            pieces += [(" ", rendering.answer[end:start]), (mark, rendering.answer[start:stop])]
            end = stop
        if not rendering.answer.endswith(samples.tokenizer.eos_token):
            pieces[-1] = (mark, pieces[-1][1] + samples.tokenizer.eos_token)
        for kind, text in pieces:
            lines += [f"{kind}{line}".rstrip() for line in text.strip("\n").split("\n")] if text.strip() else []
    return lines


def make_page() -> str:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    samples, parts = SampleTokenizer(tokenizer), [START]
    for format in FORMATS:
        row = json.loads(format.example)
        chat = show(samples, format.read(row, True))
        text = show(samples, format.read(row, False))
        further = f"; also {', '.join(f'`{column}`' for column in format.optional)}" if format.optional else ""
        columns = ", ".join(f"`{column}`" for column in format.columns)
        parts.append(f"## {format.name}\n\n{columns}{further}\n\n```json\n{format.example}\n```\n")
        parts.append("\n".join(["```diff", *chat, "```\n"]))
        if text != chat:
            parts.append(
                "\n".join(["Without a chat template, or with `--text_as_chat False`:\n", "```diff", *text, "```\n"])
            )
    parts.append("## What is refused\n\n| row | why |\n|---|---|")
    for row in REFUSED:
        reason = find_reason(row).replace("|", "\\|").replace("<", "\\<")
        parts.append(f"| `{json.dumps(row)}` | {reason} |")
    return "\n".join(parts) + "\n"


def find_reason(row: dict) -> str:
    format = recognise(list(row), preference="rejected" in row or "completions" in row)
    try:
        read_label(row, format, only_true=False)
        format.read(row, True)
    except RowError as error:
        return str(error)
    raise ValueError(f"{row} is not refused")


if __name__ == "__main__":
    PAGE.write_text(make_page(), encoding="utf-8")
