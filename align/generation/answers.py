"""Answers to all prompts: shown, timed, kept."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from align import output
from align.errors import InputError
from align.generation.decoding import TerminalStreamer, TextGenerator, Timing, as_shown
from align.generation.keeping import KeptAnswers
from align.generation.prompts import Batch

logger = logging.getLogger(__name__)

TOLD_EVERY = 10  # seconds between two lines about progress
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass
class OutputArguments:
    _argument_group_name = "Output"

    output_dir: str | None = field(
        default=None, metadata={"help": "Folder for generations.jsonl and generation_results.json."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the results of an earlier run."})
    resume: str | None = field(
        default=None,
        metadata={
            "help": "Go on behind the answers in --output_dir, or begin where there are none.",
            "nargs": "?",
            "const": "auto",
            "choices": ("auto",),
        },
    )
    benchmark: bool = field(
        default=False,
        metadata={"help": "Measure speed at exactly --max_new_tokens; --output_dir gets benchmark.json, results.json."},
    )
    warmup: int | None = field(
        default=None, metadata={"help": "Asks for a benchmark: untimed runs over all prompts before it (default: 3)."}
    )
    n_iterations: int | None = field(
        default=None, metadata={"help": "Asks for a benchmark: timed runs over all prompts (default: 5)."}
    )
    show_graphs_count: bool = field(default=False, metadata={"help": "Tell how many graphs were compiled."})
    log_level: str = field(
        default="info",
        metadata={"help": "Level of the log; debug shows what libraries say too.", "choices": LOG_LEVELS},
    )
    verbose_workers: bool = field(default=False, metadata={"help": "Let all ranks speak, not only the first."})

    @property
    def measures(self) -> bool:
        return self.benchmark or (self.warmup, self.n_iterations) != (None, None)


def prepare_output_dir(arguments: OutputArguments, rank: int = 0) -> Path | None:
    """Makes the folder (rank 0) for this run alone, where there is room; refuses one with a finished run."""
    if arguments.output_dir is None:
        return None
    folder = Path(arguments.output_dir)
    if arguments.measures and (folder / "benchmark.json").exists() and not arguments.overwrite_output_dir:
        raise InputError(f"--output_dir: {folder} holds another run; choose another, or add --overwrite_output_dir")
    if rank == 0:
        output.prepare(folder)
    return folder


def find_unanswered(batches: list[Batch], kept: KeptAnswers | None, each: int, world_size: int) -> list[Batch]:
    """The batches with an answer that is not there yet; all ranks go by what the first one has `kept`."""
    wanted = [kept is None or not kept.has(_places(batch, each)) for batch in batches]
    if world_size > 1:
        import torch

        flags = torch.tensor(wanted, dtype=torch.int32, device="hpu")
        torch.distributed.broadcast(flags, 0)
        wanted = flags.tolist()
    return [batch for batch, is_wanted in zip(batches, wanted, strict=True) if is_wanted]


def _places(batch: Batch, each: int) -> list[int]:
    """Places of the answers to these prompts, of which each has `each`."""
    return [place * each + number for place in batch.places for number in range(each)]


class Progress:
    """A line now and then: answers, tokens a second, time left."""

    def __init__(self, prompts: int, batches: list[Batch]):
        """Of all `prompts`, those of these batches are still to be answered."""
        self.left = sum(len(batch.places) for batch in batches)
        self.before, self.prompts = prompts - self.left, prompts
        self.began = self.told = time.monotonic()
        self.done = self.tokens = 0

    def add(self, prompts: int, tokens: int) -> None:
        now = time.monotonic()
        self.done += prompts
        self.tokens += tokens
        self.left -= prompts
        if self.left and now - self.told >= TOLD_EVERY:
            seconds = now - self.began
            logger.info(
                f"{self.before + self.done} of {self.prompts} prompts are answered, {self.tokens / seconds:.1f} "
                f"tokens/s, about {_in_words(seconds / self.done * self.left)} left"
            )
            self.told = now


def _in_words(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def choose_display(generator: TextGenerator) -> str:
    """How `answer_all` shows answers: a single one as it comes, on a terminal."""
    show_any_character()
    return "stream" if sys.stdout.isatty() and generator.rows == generator.copies == 1 else "print"


def show_any_character() -> None:
    """From here on a terminal that lacks a character shows its number."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def answer_all(
    generator: TextGenerator,
    prompts: list[str],
    encoded: list[list[int]],
    batches: list[Batch],
    show: str | None = None,
    between: str = "",
    seed: int = 0,
    kept: KeptAnswers | None = None,
) -> tuple[list[dict[str, Any]], list[Timing]]:
    """The answers in the order of the prompts, one or several to each, and one timing a batch.

    `show`: `stream` prints each text as it appears, `print` as soon as those before it are there; `between` prompt and
    text. What is sampled depends on `seed` and the batch, not on earlier batches. Answers are `kept` as they come;
    those that an earlier run has kept count.
    """
    each = generator.answers_per_prompt
    answers: list[Any] = [None] * (len(prompts) * each)  # until they are there
    for place, answer in kept.answers.items() if kept else ():
        answers[place] = answer
    timings, shown = [], 0
    progress = Progress(len(prompts), batches)
    for batch in batches:
        ids = [encoded[place] for place in batch.places]
        streamer = None
        if show == "stream":
            print(as_shown(prompts[batch.places[0]]), end=between, flush=True)
            streamer = TerminalStreamer(generator.tokenizer, ids[0], generator.end_tokens)
        if generator.config.do_sample:
            _set_seed(seed, batch)
        new, timing = generator.generate(ids, batch.width, streamer)
        timings.append(timing)
        made = {}
        for place, tokens in zip(_places(batch, each), new, strict=True):
            prompt = encoded[place // each]
            made[place] = answers[place] = {
                "prompt": prompts[place // each],
                "text": generator.text_of(prompt, tokens),
                "tokens": len(tokens),
                "stopped": generator.is_stopped(prompt, tokens),
            }
        if kept is not None:
            kept.add(made)
        while show == "print" and shown < len(answers) and answers[shown] is not None:
            print(as_shown(answers[shown]["prompt"] + between + answers[shown]["text"]) + "\n", flush=True)
            shown += 1
        if show is None or not sys.stdout.isatty():
            progress.add(len(batch.places), timing.new_tokens)
    return answers, timings


def _set_seed(seed: int, batch: Batch) -> None:
    from optimum.habana.utils import set_seed  # slow, but for a model that is there

    set_seed(int(np.random.SeedSequence([seed, batch.places[0]]).generate_state(1)[0]))


def describe_speed(timings: list[Timing]) -> dict[str, float | None]:
    """Means over batches in seconds, and tokens per second: of the answers alone, and of prompts and answers."""
    seconds = sum(timing.total for timing in timings)
    new_tokens = sum(timing.new_tokens for timing in timings)
    prompt_tokens = sum(timing.prompt_tokens for timing in timings)
    timed = [(timing, timing.first_token) for timing in timings if timing.first_token is not None]
    later = [(timing.total - first) / (timing.steps - 1) for timing, first in timed if timing.steps > 1]
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "seconds": round(seconds, 4),
        "first_token_seconds": round(mean(first for _, first in timed), 5) if timed else None,
        "later_token_seconds": round(mean(later), 5) if later else None,
        "tokens_per_second": round(new_tokens / seconds, 2) if seconds else None,
        "tokens_per_second_with_prompt": round((new_tokens + prompt_tokens) / seconds, 2) if seconds else None,
    }


def tell_speed(speed: dict[str, float | None]) -> None:
    first = f", the first after {speed['first_token_seconds']:.2f} s" if speed["first_token_seconds"] else ""
    rate = f": {speed['tokens_per_second']:.1f} tokens/s" if speed["tokens_per_second"] else ""
    logger.info(f"{speed['new_tokens']} tokens in {speed['seconds']:.2f} s{rate}{first}")


@contextmanager
def count_graphs(is_wanted: bool = True) -> Iterator[dict[str, int]]:
    """When the block ends, `compiled` is the number of graphs that the plugin has compiled in it."""
    if not is_wanted:
        yield {}
        return
    from habana_frameworks.torch.hpu.metrics import metric_localcontext

    counted: dict[str, int] = {}
    with metric_localcontext("graph_compilation") as compilation:
        yield counted
    counted["compiled"] = dict(compilation.stats())["TotalNumber"]


def measure(
    run: Callable[[], tuple[list[dict[str, Any]], list[Timing]]], arguments: OutputArguments, batches: int, each: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Speed of the timed runs, and what the warm-up needed: graphs that were compiled, memory. And that as upstream.

    A run has that many `batches`, and `each` prompt that many answers.
    """
    from optimum.habana.utils import get_hpu_memory_stats

    warmup = 3 if arguments.warmup is None else arguments.warmup
    with count_graphs() as graphs:
        for _ in range(warmup):
            run()
    runs = [run() for _ in range(5 if arguments.n_iterations is None else arguments.n_iterations)]
    memory = get_hpu_memory_stats()
    measured = describe_speed([timing for _, timings in runs for timing in timings]) | {
        "graphs": graphs["compiled"] if warmup else None,
        "memory_gb": memory["memory_allocated (GB)"],
        "max_memory_gb": memory["max_memory_allocated (GB)"],
    }
    return measured, _describe_as_upstream(measured, runs[-1][0], batches, each)


def _describe_as_upstream(
    measured: dict[str, Any], answers: list[dict[str, Any]], batches: int, each: int
) -> dict[str, Any]:
    """What optimum-habana's example writes to results.json: seconds a batch, tokens a second, prompts, whole texts."""
    return {
        "throughput": measured["tokens_per_second"],
        "avg_first_token_latency": measured["first_token_seconds"],
        "avg_rest_token_latency": measured["later_token_seconds"],
        "avg_e2e_latency": measured["seconds"] / batches,
        "input": [[answer["prompt"]] for answer in answers[::each]],
        "output": [[answer["prompt"] + answer["text"]] for answer in answers],
    }


def print_table(results: dict[str, Any]) -> None:
    for name, value in results.items():
        print(f"{name:30} {value}")
