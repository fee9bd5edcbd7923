"""The quickstart's own small world: who lives in a village, told as plain text, and asked about.

Every villager has one value of each attribute. All of it is told in the pretraining text, in several wordings. Training
asks about each fact in all wordings but one; the held-out questions are in that one. An answer comes in two styles,
terse or as a friendly sentence, so that preference tuning has something to teach that anybody can see.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from quickstart.stages import read_rows

PEOPLE = ("Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul").split()
ROUNDS = 80  # portraits of each villager in the pretraining text
COURTESY = "Happy to help!"
INTERVIEWS = 1 / 3  # share of the portraits that put a question before each statement
FRIENDLY = 1 / 3  # share of the friendly answers in fine-tuning


@dataclass(frozen=True)
class Attribute:
    """One thing to know about a villager; a full answer makes the first statement."""

    values: tuple[str, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


ATTRIBUTES = {
    "home": Attribute(
        ("Oslo", "Lima", "Cairo", "Paris", "Tokyo", "Delhi", "Quito", "Rome", "Dakar", "Perth", "Prague", "Havana"),
        (
            "{name} lives in {value}.",
            "{name} has a house in {value}.",
            "The home of {name} is in {value}.",
            "{name} has settled in {value}.",
        ),
        (
            "Where does {name} live?",
            "Which city does {name} live in?",
            "In which city is the home of {name}?",
            "Where has {name} settled?",
        ),
    ),
    "trade": Attribute(
        ("baker", "painter", "doctor", "teacher", "farmer", "pilot", "tailor", "sailor", "judge", "miner", "nurse")
        + ("cook",),
        (
            "{name} works as a {value}.",
            "{name} earns a living as a {value}.",
            "The trade of {name} is that of a {value}.",
            "{name} has the job of a {value}.",
        ),
        (
            "What does {name} work as?",
            "Which trade does {name} work in?",
            "What is the trade of {name}?",
            "Which job does {name} have?",
        ),
    ),
    "pet": Attribute(
        ("parrot", "cat", "dog", "pony", "rabbit", "turtle", "hamster", "goat", "lizard", "canary", "hen", "mouse"),
        (
            "{name} keeps a {value}.",
            "{name} looks after a {value}.",
            "The pet of {name} is a {value}.",
            "{name} takes care of a {value}.",
        ),
        (
            "Which pet does {name} keep?",
            "What animal does {name} keep?",
            "What is the pet of {name}?",
            "Which animal does {name} look after?",
        ),
    ),
}


@dataclass(frozen=True)
class Question:
    """One question, what is true, and the two ways to say so."""

    key: str
    name: str
    value: str
    text: str

    @property
    def prompt(self) -> str:
        """What sft.py and dpo.py make of the column `question`, up to the answer's first token."""
        return f"Question: {self.text}\n\nAnswer:"

    @property
    def short(self) -> str:
        said = ATTRIBUTES[self.key].statements[0].format(name="", value=self.value).strip()
        return said[0].upper() + said[1:]

    @property
    def full(self) -> str:
        statement = ATTRIBUTES[self.key].statements[0].format(name=self.name, value=self.value)
        return f"{statement} {COURTESY}"


World = dict[str, dict[str, str]]  # name -> attribute -> value


def make_world(rng: random.Random) -> World:
    return {name: {key: rng.choice(attribute.values) for key, attribute in ATTRIBUTES.items()} for name in PEOPLE}


def tell(world: World, asked: Iterable[Question], rng: random.Random) -> list[str]:
    """The pretraining text: portraits of everybody, each time in another wording.

    Some are interviews, with the questions that fine-tuning may ask: without a single question in its text a model this
    small takes far longer to understand one.
    """
    questions = defaultdict(list)
    for question in asked:
        questions[question.name, question.key].append(question.text)
    texts = []
    for _ in range(ROUNDS):
        for name, facts in world.items():
            is_interview = rng.random() < INTERVIEWS
            told = []
            for key, value in facts.items():
                told += [rng.choice(questions[name, key])] if is_interview else []
                told.append(rng.choice(ATTRIBUTES[key].statements).format(name=name, value=value))
            texts.append(" ".join(told))
    rng.shuffle(texts)
    return texts


def ask(world: World) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and the held-out ones: each person is asked about in three of the four wordings."""
    train, held_out = [], []
    for person, (name, facts) in enumerate(world.items()):
        for key, value in facts.items():
            for wording, text in enumerate(ATTRIBUTES[key].questions):
                question = Question(key, name, value, text.format(name=name))
                (held_out if wording == person % 4 else train).append(question)
    return train, held_out


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path, seed: int) -> list[Question]:
    """Writes all data sets in the guide's shapes, and returns the held-out questions.

    `text.jsonl` to pretrain on; `questions/` with train and validation split, where a third of the answers to learn
    (`response_j`) are friendly; `preferences/` likewise, where `response_j` always is.
    """
    rng = random.Random(seed)
    world = make_world(rng)
    train, held_out = ask(world)
    write_rows(folder / "text.jsonl", ({"text": text} for text in tell(world, train, rng)))
    for split, questions in {"train": train, "validation": held_out}.items():
        mixed, preferred = [], []
        for question in rng.sample(questions, len(questions)):
            answers = [question.full, question.short]
            preferred.append(_row(question, answers))
            mixed.append(_row(question, answers if rng.random() < FRIENDLY else answers[::-1]))
        write_rows(folder / "questions" / f"{split}.jsonl", mixed)
        write_rows(folder / "preferences" / f"{split}.jsonl", preferred)
    write_rows(folder / "held_out.jsonl", ({"prompt": question.prompt} for question in held_out))
    return held_out


def _row(question: Question, answers: list[str]) -> dict[str, str]:
    return {"question": question.text, "response_j": answers[0], "response_k": answers[1]}


def make_model(folder: Path, data: Path, seed: int) -> None:
    """A random Llama of two million weights, and a tokenizer learnt from the data it will see."""
    texts = [value for file in sorted(data.rglob("*.jsonl")) for row in read_rows(file) for value in row.values()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.06,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    set_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
