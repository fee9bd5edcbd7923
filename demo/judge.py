"""What is asked of an answer, by rules that everybody can check: to be brief, to be sound, to be right.

An answer is a row of run_generation.py's generations.jsonl: `prompt`, `text`, and whether it `stopped` by itself.
"""

import re
from collections import Counter

MOST_SENTENCES, MOST_WORDS, FEWEST_WORDS = 2, 40, 3
MOST_WORDS_OF_AN_ITEM = 12
LOOP = 5  # words in a row that come three times are a loop
NUMBERS = {"three": 3, "four": 4, "five": 5}
EMPTY = set(
    """a about an and are at be best by can describe difference do does for found from go good happen has have heard how
    i in is it its know let like made make many me mean means my never not of on or please purpose should some something
    tell that the their them there they this to understand use used want was we were what when where which who why will
    with work you your explain need needs""".split()
)
APOLOGY = re.compile(
    r"\b(sorry|apologi[sz]e|apologies|as an ai|i am an ai|i'm an ai|language model|i (can't|cannot|am unable|don't)"
    r"|i'm (not able|unable|here|ready))\b",
    re.IGNORECASE,
)
SENTENCE = re.compile(r"[^.!?]+(?:[.!?](?=\w)[^.!?]*)*[.!?]+[\"')]*(?=\s|$)")
ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*•])\s+(.+)$")


def split_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower().replace("’", "'"))


def split_sentences(text: str) -> list[str]:
    """The whole sentences at the start of a text; what does not end with a mark is none."""
    return [match.group().strip() for match in SENTENCE.finditer(text)]


def split_items(text: str) -> list[str]:
    """The items of a numbered or dotted list, or of one line with commas."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    items = [match[1].strip() for match in map(ITEM.match, lines) if match]
    if not items and len(lines) == 1:
        items = [part.strip(" .") for part in re.split(r",\s*(?:and\s+)?|\s+and\s+", lines[0].split(":")[-1])]
    return items


def asked_items(prompt: str) -> int | None:
    """How many items a prompt asks for, or None where it asks no list."""
    match = re.match(r"(?:List|Name) (three|four|five) ", prompt)
    return NUMBERS[match[1]] if match else None


def stem(word: str) -> str:
    return word[: max(4, len(word) - 3)] if len(word) > 4 else word.rstrip("s")


def keeps_subject(prompt: str, text: str) -> bool:
    """Whether at least half of the words that carry the question come back in the answer, whatever their endings."""
    carrying = {stem(word) for word in split_words(prompt) if word not in EMPTY}
    said = split_words(text)
    kept = sum(any(word.startswith(each) for word in said) for each in carrying)
    return 2 * kept >= len(carrying)


def loops(text: str) -> bool:
    """Whether five words in a row come three times, or a sentence, a line or an item twice."""
    words = split_words(text)
    runs = Counter(tuple(words[start : start + LOOP]) for start in range(len(words) - LOOP + 1))
    lines = [ITEM.sub(r"\1", line) for line in text.splitlines()]
    repeats = (
        Counter(filter(None, (" ".join(split_words(part)) for part in parts)))
        for parts in (lines, split_sentences(text))
    )
    return max(runs.values(), default=0) >= 3 or any(max(counts.values(), default=0) >= 2 for counts in repeats)


def is_brief(answer: dict) -> bool:
    """The preference: one or two whole sentences of 40 words at most, or the list that was asked for, and an end."""
    text, wanted = answer["text"].strip(), asked_items(answer["prompt"])
    if not answer["stopped"]:
        return False
    if wanted is not None:
        items = split_items(text)
        return len(items) == wanted and all(len(split_words(item)) <= MOST_WORDS_OF_AN_ITEM for item in items)
    sentences, words = split_sentences(text), len(split_words(text))
    whole = " ".join(sentences).split() == text.split()
    return whole and 1 <= len(sentences) <= MOST_SENTENCES and FEWEST_WORDS <= words <= MOST_WORDS


def find_faults(answer: dict) -> list[str]:
    """What is wrong with an answer, however long it is: none of it is sane."""
    prompt, text = answer["prompt"], answer["text"].strip()
    wanted = asked_items(prompt)
    found = {
        "does not end": not answer["stopped"],
        "loops": loops(text),
        "apologises": bool(APOLOGY.search(text)),
        "loses the subject": wanted is None and not keeps_subject(prompt, text),
        "not the list that was asked for": wanted is not None and len(split_items(text)) != wanted,
        "says nothing": len(split_words(text)) < FEWEST_WORDS,
    }
    return [fault for fault, holds in found.items() if holds]


def is_sane(answer: dict) -> bool:
    return not find_faults(answer)


def is_right(answer: dict, words: list[str]) -> bool:
    """Whether one of the words is said."""
    return any(re.search(rf"\b{re.escape(word)}\b", answer["text"], re.IGNORECASE) for word in words)
