"""What the demo teaches: mostly the model's own words; no other model wrote any of it.

The answer to learn is the start of what the model says anyway, up to a whole sentence, and then an end. The answer to
turn from is another that it gave to the same question, sampled, as long as it went. It must start otherwise: an answer
that goes on where the better one ends would only teach that the words which follow are bad.
"""

import json
import re
from pathlib import Path

from demo.judge import asked_items, is_brief, is_sane, split_sentences, split_words

ENOUGH = 26  # words that two sentences may have together; else the first one does
SHARED = 4  # words that both answers of a pair may start with
EVASIVE = re.compile(r"(the (answer|reason)\b|the eternal\b|while\b|when it comes\b|ah\b)", re.IGNORECASE)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def shorten(answer: dict) -> str | None:
    """The brief and sane answer that a longer one starts with, or None where it starts with none."""
    sentences = split_sentences(answer["text"].strip().split("\n\n")[0])
    two = " ".join(sentences[:2])
    for text in [two, *sentences[:1]] if len(split_words(two)) <= ENOUGH else sentences[:1]:
        cut = {"prompt": answer["prompt"], "text": text, "stopped": True}
        if is_brief(cut) and is_sane(cut) and not EVASIVE.match(text):
            return text
    return None


def start_alike(first: str, second: str) -> bool:
    return split_words(first)[: SHARED + 1] == split_words(second)[: SHARED + 1]


def make_data(greedy: list[dict], sampled: list[dict], written: dict[str, str]) -> tuple[list[dict], list[dict]]:
    """Rows to fine-tune on and pairs to prefer by, from two answers of the model to each question.

    The better answer is the written one where there is one, else the start of the greedy one, else of the sampled one.
    A list is preferred to its first item as well, so that the model does not learn that the shortest answer is best.
    """
    samples, pairs = [], []
    for first, second in zip(greedy, sampled, strict=True):
        prompt = first["prompt"]
        better = written.get(prompt) or shorten(first) or shorten(second)
        if better is None:
            continue
        samples.append({"prompt": prompt, "completion": better})
        for other in (second, first):
            if not is_brief(other) and not start_alike(better, other["text"]):
                pairs.append({"prompt": prompt, "chosen": better, "rejected": other["text"].strip()})
                break
        if asked_items(prompt):
            pairs.append({"prompt": prompt, "chosen": better, "rejected": better.splitlines()[0]})
    return samples, pairs
