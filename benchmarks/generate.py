"""run_generation.py against optimum-habana's way and plain transformers: the wait for the first word, speed, graphs.

python benchmarks/generate.py            some ten minutes on two quiet cores

The first word is timed from the command to the first new text on a terminal, each way in a process of its own;
optimum-habana's way shows its text after three warm-up and five timed runs. Speed is that of a small random Llama in
float32 at a fixed length, on prompts of mixed lengths; graphs are those that the emulator counts, with beams for two
numbers of steps. Rounds are interleaved; for the first word their
median counts, for speed the best, as noise only slows. Speed is this host's, not a card's.
"""

import argparse
import contextlib
import json
import logging
import os
import pty
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from _figures import add_json_flag, keep
from tqdm import trange

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HABANA_EMULATOR_STRICT", "0")

NEW_TOKENS, BATCH_SIZE = 50, 8
RUNS = {1: 10, 8: 4, 64: 1, 512: 1}  # of a measurement, by number of prompts: each takes seconds
MANY = 512  # prompts that are measured in one round alone: they take minutes
BEAMS, BEAM_STEPS = 4, (12, 48)
WORDS = [f"word{number}" for number in range(2000)]
OURS, UPSTREAM, PLAIN = "run_generation.py", "optimum-habana's way", "plain transformers"
UPSTREAM_WARMUP, UPSTREAM_RUNS = 3, 5  # what its script does before it shows a text


def make_model(folder: Path) -> None:
    """A Llama of 15M random weights, with a tokenizer that has a token for each word and none that ends a text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def draw_prompts(number: int) -> list[str]:
    """Prompts of 4 to 200 words, short ones more often."""
    generator = random.Random(0)
    return [
        " ".join(generator.choices(WORDS, k=min(200, 4 + int(generator.expovariate(1 / 40))))) for _ in range(number)
    ]


def load_plain(folder: str, streams: bool = False) -> Callable[[list[str]], None]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token=WORDS[0])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def generate(prompts: list[str]) -> None:
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
            streamer = TextStreamer(tokenizer, skip_prompt=True) if streams else None
            model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, streamer=streamer)

    return generate


def load_upstream(folder: str, new_tokens: int = NEW_TOKENS, num_beams: int = 1) -> Callable[[list[str]], list[str]]:
    """What optimum-habana's text-generation example does: each batch as wide as its longest prompt, no end tokens."""
    from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

    adapt_transformers_to_gaudi()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from habana_frameworks.torch.hpu import wrap_in_hpu_graph

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", pad_token=WORDS[0])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().to("hpu")
    model = wrap_in_hpu_graph(model)
    config = model.generation_config
    config.max_new_tokens, config.static_shapes, config.bucket_size = new_tokens, True, -1
    config.use_cache, config.pad_token_id, config.num_beams = True, 0, num_beams
    if num_beams > 1:
        model.config.eos_token_id = len(WORDS)  # no token's: its beam search stops with an error where there is none

    def generate(prompts: list[str]) -> list[str]:
        texts = []
        for start in range(0, len(prompts), BATCH_SIZE):
            inputs = tokenizer(
                prompts[start : start + BATCH_SIZE], return_tensors="pt", padding=True, return_token_type_ids=False
            ).to("hpu")
            output = model.generate(
                **inputs, generation_config=config, lazy_mode=True, hpu_graphs=True, ignore_eos=True, iteration_times=[]
            )
            texts += tokenizer.batch_decode(output.cpu(), skip_special_tokens=True)
        return texts

    return generate


def say_first_word(way: str, folder: str) -> None:
    """The child process of one way."""
    prompts = draw_prompts(1)
    if way == PLAIN:
        load_plain(folder, streams=True)(prompts)
    else:
        generate = load_upstream(folder)
        for _ in range(UPSTREAM_WARMUP + UPSTREAM_RUNS):
            texts = generate(prompts)
        print(texts[0].removeprefix(prompts[0]))


def time_first_word(command: list[str], known: str, environment: dict[str, str]) -> float:
    """Seconds until the command shows more than `known` on its terminal."""
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=os.environ | environment)
    os.close(theirs)
    shown, first = b"", None
    while chunk := _read(ours):
        shown += chunk
        if first is None and len(shown.replace(b"\r\n", b"")) > len(known):
            first = time.perf_counter() - start
    os.close(ours)
    if process.wait() or first is None:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return first


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say that the other side is closed
        return b""


def compare_first_words(folder: str, rounds: int) -> dict[str, float]:
    prompt = draw_prompts(1)[0]
    this = [sys.executable, __file__, "--folder", folder, "--say"]
    flags = ["--model_name_or_path", folder, "--prompt", prompt, "--max_new_tokens", str(NEW_TOKENS)]
    ways = {
        PLAIN: ([*this, PLAIN], "", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),  # without the emulator
        UPSTREAM: ([*this, UPSTREAM], "", {}),
        OURS: ([sys.executable, str(ROOT / "run_generation.py"), *flags, "--use_hpu_graphs"], prompt, {}),
    }
    times = {way: [] for way in ways}
    for _ in trange(rounds, desc="first word", unit=" rounds", leave=False):
        for way, arguments in ways.items():
            times[way].append(time_first_word(*arguments))
    return {way: statistics.median(seconds) for way, seconds in times.items()}


def measure_speed(generate: Callable[[list[str]], object], prompts: list[str]) -> float:
    """New tokens per second."""
    runs = RUNS[len(prompts)]
    start = time.perf_counter()
    for _ in range(runs):
        generate(prompts)
    return runs * len(prompts) * NEW_TOKENS / (time.perf_counter() - start)


def measure_ours(folder: str, prompts: list[str], new_tokens: int = NEW_TOKENS, num_beams: int = 1) -> dict[str, float]:
    """As many runs of `run_generation.py --benchmark` in this process, warmed up."""
    import run_generation

    with tempfile.TemporaryDirectory() as output:
        flags = ["--model_name_or_path", folder, "--output_dir", output, "--max_new_tokens", str(new_tokens)]
        flags += ["--num_beams", str(num_beams)]
        flags += ["--batch_size", str(min(BATCH_SIZE, len(prompts)))]
        flags += ["--use_hpu_graphs", "--benchmark", "--warmup", "1"]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            run_generation.main([*flags, "--n_iterations", str(RUNS[len(prompts)]), "--prompt", *prompts])
        return json.loads(Path(output, "benchmark.json").read_text())


def compare_speeds(folder: str, prompts: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """New tokens per second and graphs of optimum-habana's way and ours."""
    from habana_frameworks.emulator.graph_counter import count_graphs

    generate = load_upstream(folder)
    with count_graphs() as graphs:
        generate(prompts)
    upstream, ours = [], []
    for _ in trange(rounds, desc=f"{len(prompts)} prompts", unit=" rounds", leave=False):
        upstream.append(measure_speed(generate, prompts))
        ours.append(measure_ours(folder, prompts))
    return {
        PLAIN: {"tokens_per_second": measure_plain(folder, len(prompts), rounds)},
        UPSTREAM: {"tokens_per_second": max(upstream), "graphs": graphs.distinct},
        OURS: {"tokens_per_second": max(run["tokens_per_second"] for run in ours), "graphs": ours[0]["graphs"]},
    }


def count_beam_graphs(folder: str) -> dict[str, list[int]]:
    """Graphs of a beam search over 8 prompts, for each number of steps."""
    from habana_frameworks.emulator.graph_counter import count_graphs

    prompts, counted = draw_prompts(BATCH_SIZE), {UPSTREAM: [], OURS: []}
    for steps in BEAM_STEPS:
        generate = load_upstream(folder, steps, BEAMS)
        with count_graphs() as graphs:
            generate(prompts)
        counted[UPSTREAM].append(graphs.distinct)
        counted[OURS].append(measure_ours(folder, prompts, steps, BEAMS)["graphs"])
    return counted


def measure_plain(folder: str, number: int, rounds: int) -> float:
    """New tokens per second of plain transformers, in a process without optimum-habana and the emulator."""
    command = [sys.executable, __file__, "--folder", folder, "--rounds", str(rounds), "--plain_speed", str(number)]
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--prompts", type=int, nargs="+", choices=RUNS, default=list(RUNS), help="numbers of prompts")
    add_json_flag(parser)
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # of the model, for the child processes below
    parser.add_argument("--say", choices=[PLAIN, UPSTREAM], help=argparse.SUPPRESS)
    parser.add_argument("--plain_speed", type=int, help=argparse.SUPPRESS)  # of that many prompts
    args = parser.parse_args()
    if args.say:
        say_first_word(args.say, args.folder)
        return
    if args.plain_speed:
        generate, prompts = load_plain(args.folder), draw_prompts(args.plain_speed)
        print(max(measure_speed(generate, prompts) for _ in range(args.rounds + 1)))  # the first one warms up
        return
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        beam_graphs = count_beam_graphs(folder)  # first, as it is quick to fail
        first_words = compare_first_words(folder, args.rounds)
        speeds = {
            number: compare_speeds(folder, draw_prompts(number), 1 if number == MANY else args.rounds)
            for number in args.prompts
        }
    rows = []
    print(f"{'':21} {'first word':>10} {'x plain':>8} " + " ".join(f"{n:>6} prompts {'graphs':>7}" for n in speeds))
    for way, first_word in first_words.items():
        figures = {number: each[way] for number, each in speeds.items()}
        line = f"{way:21} {first_word:8.2f} s {first_word / first_words[PLAIN]:8.2f} "
        print(line + " ".join(f"{f['tokens_per_second']:8.0f} t/s {f.get('graphs', '-'):>9}" for f in figures.values()))
        rows.append({"way": way, "first_word_seconds": first_word, "by_number_of_prompts": figures})
        rows[-1]["beam_graphs"] = beam_graphs.get(way)
    for way, graphs in beam_graphs.items():
        print(
            f"{way}: {BEAMS} beams, {' and '.join(map(str, BEAM_STEPS))} steps: {' and '.join(map(str, graphs))} graphs"
        )
    keep(args.json, rows)


if __name__ == "__main__":
    main()
