"""Shows samples as the model will see them, in the terminal and as a page to look at and send on."""

import html
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from align.data.packing import IGNORED
from align.data.preparing import Prepared

START, END = "▸", "◂"  # around what is learnt
STYLE = """
body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#212529;background:#fff}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f8f9fa;border-radius:.5rem;padding:1rem;color:#868e96}
b{font-weight:400;background:#d3f9d8;color:#2b8a3e}
i{font-style:normal;border:1px solid;border-radius:.25rem;margin:0 1px}
h2{font-size:1rem;margin:2rem 0 .5rem}p{color:#495057}
"""


@dataclass(frozen=True)
class Piece:
    """Tokens side by side that are alike: learnt or not, special or not."""

    text: str
    is_learnt: bool
    is_special: bool


def show_examples(
    prepared: dict[str, Prepared], tokenizer: PreTrainedTokenizerBase, number: int, page: Path | None = None
) -> None:
    """Prints the first samples, and the first one of each kind that something was told about, such as being cut.

    What is learnt is green and stands between marks, special tokens are reversed. `page` is where the same is written.
    """
    body = []
    for title, ids, labels in _find_samples(prepared, number):
        pieces = _find_pieces(ids, labels, tokenizer)
        print(f"\033[1m{title}\033[0m")
        print("".join(map(_color, _with_marks(pieces))), end="\n\n")
        body.append(f"<h2>{html.escape(title)}</h2><pre>{''.join(map(_tag, _with_marks(pieces)))}</pre>")
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(
            '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
            f'initial-scale=1"><title>Examples</title><style>{STYLE}</style><h1>What the model will see</h1>'
            f"<p>The text between {START} and {END} on green is learnt. Framed text is one special token.</p>"
            f"{''.join(body)}</html>\n",
            encoding="utf-8",
        )
        print(f"The same as a page: {page}")


def _find_samples(prepared: dict[str, Prepared], number: int) -> Iterator[tuple[str, list[int], list[int]]]:
    for split, part in prepared.items():
        notes: dict[int, list[str]] = {}
        for note, index in part.noted.items():
            notes.setdefault(index, []).append(note)
        place = -1
        for place, row in enumerate(itertools.islice(part.rows, number)):
            yield from _read(_title(split, place, notes), row)
        if place + 1 < number:
            print(f"{split} has {place + 1} sample(s), not {number}")
        if not isinstance(part.rows, IterableDataset):
            for index in sorted(notes):
                if index > place:
                    yield from _read(_title(split, index, notes), part.rows[index])


def _title(split: str, index: int, notes: dict[int, list[str]]) -> str:
    about = f" ({'; '.join(notes[index])})" if index in notes else ""
    return f"{split}, sample {index + 1}{about}"


def _read(title: str, row: dict) -> Iterator[tuple[str, list[int], list[int]]]:
    if "labels" in row:
        yield title, row["input_ids"], row["labels"]
        return
    prompt = row["prompt_input_ids"]
    for answer in ("chosen", "rejected"):
        labels = [IGNORED] * len(prompt) + list(row[f"{answer}_labels"])
        yield f"{title}, {answer}", [*prompt, *row[f"{answer}_input_ids"]], labels


def _find_pieces(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Ids are decoded together where they are alike, as several may make one character."""
    special = set(tokenizer.all_special_ids)
    kinds = [(label != IGNORED, token if token in special else None) for token, label in zip(ids, labels, strict=True)]
    pieces = []
    for (is_learnt, token), group in itertools.groupby(zip(kinds, ids, strict=True), key=lambda pair: pair[0]):
        pieces.append(Piece(tokenizer.decode([each for _, each in group]), is_learnt, token is not None))
    return pieces


def _with_marks(pieces: list[Piece]) -> Iterator[Piece]:
    before = False
    for piece in pieces:
        if piece.is_learnt != before:
            yield Piece(START if piece.is_learnt else END, True, False)
        yield piece
        before = piece.is_learnt
    if before:
        yield Piece(END, True, False)


def _color(piece: Piece) -> str:
    style = ("7;" if piece.is_special else "") + ("32" if piece.is_learnt else "90")
    return f"\033[{style}m{piece.text}\033[0m"


def _tag(piece: Piece) -> str:
    text = html.escape(piece.text)
    text = f"<i>{text}</i>" if piece.is_special else text
    return f"<b>{text}</b>" if piece.is_learnt else text
