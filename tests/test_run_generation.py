"""run_generation.py against plain transformers. Run: pytest tests/test_run_generation.py"""

import fcntl
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_rows
from plain_generation import END_TOKENS
from tiny import make_tokenizer, save_model

from align.cli import run_script
from align.errors import InputError
from align.generation import decoding
from align.generation.decoding import decode_new
from align.generation.keeping import KeptAnswers, write_json
from align.generation.prompts import PromptArguments, load_prompts, plan_batches
from align.merge.checkpoints import open_checkpoint
from align.upstream_fixes import adapt_transformers
from run_generation import main

FAMILIES = ["llama", "mistral", "mixtral", "qwen2", "gpt2"]
NOT_SPLIT = "persimmon"  # over several cards: DeepSpeed splits it wrongly
TOKENIZERS = {"llama": "llama-2", "mistral": "mistral", "mixtral": "mistral", "qwen2": "qwen", "gpt2": "gpt2"}
TOKENIZERS[NOT_SPLIT] = "qwen"
PROMPTS = [
    "Hello",
    "What is the capital of France?",
    "two and two",
    "I am fine, thank you very much. How are you today? Hello there, be brief, of course!",
    "System: be brief.",
    "is",
    "It is four. It is four. It is four.",
    "thank you",
]
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A random model of each family, the folder of an adapter for the Llama, and plain transformers' texts."""
    root = tmp_path_factory.mktemp("models")
    adapt_transformers()  # before transformers' Auto classes have seen, and remembered, a model of its own
    for family in (*FAMILIES, NOT_SPLIT):
        save_model(root / family, family, TOKENIZERS[family], initializer_range=0.2)
        change_json(root / family / "generation_config.json", eos_token_id=list(END_TOKENS))
    make_adapter(root / "llama", root / "adapter", "q_proj", "v_proj")
    return root


def change_json(path, **changes):
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_adapter(model, folder, *targets, new_token=None):
    """A random adapter; with a new token its folder has the tokenizer too, as a training run leaves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config = LoraConfig(target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM")
    if new_token:
        unused = [f"<unused {number}>" for number in range(len(tokenizer), model.config.vocab_size)]
        tokenizer.add_tokens([*unused, new_token])
        model.resize_token_embeddings(len(tokenizer))
        config.modules_to_save = ["embed_tokens", "lm_head"]
        tokenizer.save_pretrained(folder)
    get_peft_model(model, config).save_pretrained(folder)


@pytest.fixture(scope="module")
def plain(models):
    """`plain[name]`: what plain transformers say to PROMPTS, by family and for what only the Llama is asked."""
    job = {"prompts": PROMPTS, "options": {"max_new_tokens": NEW_TOKENS}}
    jobs = {family: job | {"model": str(models / family)} for family in (*FAMILIES, NOT_SPLIT)}
    jobs["adapter"] = jobs["llama"] | {"adapter": str(models / "adapter")}
    jobs["penalty"] = jobs["llama"] | {"options": job["options"] | {"repetition_penalty": 1.5}}
    jobs["beams"] = jobs["llama"] | {"options": job["options"] | {"num_beams": 3}}
    (models / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, ROOT / "tests" / "plain_generation.py", models / "jobs.json"]
    texts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return dict(zip(jobs, texts, strict=True))


@pytest.fixture
def generate(run, models):
    """Answers to PROMPTS, or to what the flags name, as written to --output_dir."""

    def generate(*flags, family="llama", prompts=PROMPTS, output="out"):
        asked = ["--prompt", *prompts] if prompts else []
        options = ["--max_new_tokens", NEW_TOKENS, "--output_dir", output, *asked, *flags]
        run("run_generation.py", "--model_name_or_path", models / family, *options)
        return [json.loads(line) for line in Path(output, "generations.jsonl").read_text().splitlines()]

    return generate


def count_parameters(folder):
    return sum(math.prod(tensor.shape) for tensor in open_checkpoint(folder).tensors.values())


def texts(answers):
    return [answer["text"] for answer in answers]


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_kv_cache", "False"],
        ["--use_hpu_graphs", "--limit_hpu_graphs", "--use_flash_attention"],
        ["--bucket_size", "16", "--use_hpu_graphs"],
        ["--reuse_cache", "--use_hpu_graphs"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_that_of_plain_transformers(generate, plain, family, flags, batch_size, caplog):
    answers = generate("--batch_size", batch_size, *flags, family=family)

    assert texts(answers) == plain[family]
    assert {answer["stopped"] for answer in answers} == {True, False}
    assert all(answer["tokens"] == NEW_TOKENS for answer in answers if not answer["stopped"])
    has_none = "--reuse_cache has no effect: optimum-habana has none for gpt2 models." in caplog.messages
    assert has_none == (family == "gpt2" and "--reuse_cache" in flags)


def test_two_ranks_that_share_a_model_say_what_one_says_and_go_on_together(models, plain):
    command = [sys.executable, ROOT / "gaudi_spawn.py", "--world_size", "2", "--use_deepspeed"]
    folders = [str(models / family) for family in (*FAMILIES, NOT_SPLIT)]

    command += [ROOT / "tests" / "generation_ranks.py", *folders, "--", *PROMPTS]

    ranks = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)

    assert ranks.returncode == 0, ranks.stderr

    for family in (*FAMILIES, NOT_SPLIT):
        answers = [json.loads(line) for line in Path(family, "generations.jsonl").read_text().splitlines()]
        assert texts(answers) == plain[family]
        results = json.loads(Path(family, "generation_results.json").read_text())
        assert results["cards"] == 2
        is_split = results["parameters"] < 0.8 * count_parameters(models / family)
        assert is_split == (family not in ("gpt2", NOT_SPLIT))
    assert "DeepSpeed splits no gpt2 model" in ranks.stderr
    assert "Each card holds the whole persimmon model: split over cards it says other text." in ranks.stderr
    spoilt = [json.loads(line) for line in Path("spoilt", "generations.jsonl").read_text().splitlines()]
    assert texts(spoilt) == plain["llama"]
    assert ranks.stderr.count("llama: runs with transformers' own class") == 1
    resumed = json.loads(Path(FAMILIES[0], "generation_results.json").read_text())
    assert resumed["answered_before"] == 3
    assert resumed["prompt_tokens"] < results["prompt_tokens"]


@pytest.mark.parametrize("flags", [("adapter", "--peft_model"), ("penalty", 1.5), ("beams", 3)])
def test_adapter_penalty_and_beams_are_those_of_plain_transformers(generate, plain, models, flags):
    name, value = flags
    options = {
        "adapter": ["--peft_model", models / "adapter"],
        "penalty": ["--repetition_penalty", value],
        "beams": ["--num_beams", value],
    }
    assert texts(generate("--batch_size", 8, *options[name])) == plain[name] != plain["llama"]


def test_an_adapter_on_a_tied_embedding_leaves_the_head_as_it_was(generate, models, run):
    make_adapter(models / "gpt2", "adapter", "wte")
    run("merge_peft_adapter.py", "--adapter_model_name", "adapter", "--output_name", "merged")
    merged = texts(generate(family=Path("merged").absolute(), output="one"))

    assert texts(generate("--peft_model", "adapter", family="gpt2")) == merged


def test_an_adapter_that_brought_a_token_reads_it_and_so_does_the_merged_model(generate, models, run):
    make_adapter(models / "llama", "adapter", "q_proj", new_token="<new>")
    prompts = ["Hello <new>", "Hello", "Hello <new><new>"]
    said = texts(generate("--peft_model", "adapter", prompts=prompts))
    run("merge_peft_adapter.py", "--adapter_model_name", "adapter", "--output_name", "merged")

    assert texts(generate(family=Path("merged").absolute(), prompts=prompts, output="of the merged")) == said
    assert len(set(said)) == 3


def test_the_first_token_of_beams_is_not_timed_and_a_benchmark_has_them_in_full_length(run, models):
    flags = ["--num_beams", 2, "--benchmark", "--output_dir", "out", "--max_new_tokens", NEW_TOKENS, "--prompt", "Hi"]
    run("run_generation.py", "--model_name_or_path", models / "llama", *flags, "--n_iterations", 1)

    measured = json.loads(Path("out/benchmark.json").read_text())
    assert measured["new_tokens"] == NEW_TOKENS
    assert measured["first_token_seconds"] is None
    assert measured["later_token_seconds"] is None


def test_sampling_says_the_same_with_the_same_seed_and_else_another_thing(generate):
    flags = ["--do_sample", "--temperature", "1.5", "--top_k", "50", "--top_p", "0.9", "--batch_size", 4]

    first, again, other = (texts(generate(*flags, "--seed", seed, output=f"{seed}{n}")) for n, seed in enumerate("112"))

    assert first == again != other
    twice = texts(generate(*flags, "--batch_size", 1, prompts=PROMPTS[:1] * 2, output="twice"))
    assert twice[0] != twice[1]


def test_every_source_of_prompts_gives_the_same_answers_in_order(generate, monkeypatch):
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    write_rows("prompts.jsonl", [{"question": prompt} for prompt in PROMPTS])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))

    answers = generate(output="argument")

    assert [answer["prompt"] for answer in answers] == PROMPTS
    column = ["--column_name", "question"]
    assert generate("--prompt_file", "prompts.txt", prompts=[], output="text") == answers
    assert generate("--prompt_file", "prompts.jsonl", *column, prompts=[], output="rows") == answers
    assert generate("--dataset_name", "prompts.jsonl", *column, prompts=[], output="data") == answers
    Path("set").mkdir()
    Path("prompts.jsonl").rename("set/test.jsonl")
    split = ["--dataset_name", "set", "--dataset_split", "test"]
    assert generate(*split, *column, prompts=[], output="split") == answers
    assert generate(prompts=[], output="stdin") == answers


def test_flags_about_rows_are_told_where_no_row_is_read(caplog):
    load_prompts(PromptArguments(prompt=["Hi"], column_name="question", dataset_split="test"), world_size=1)

    told = [record.getMessage() for record in caplog.records]
    assert told == [f"--{flag} has no effect: it is for --dataset_name." for flag in ("dataset_split", "column_name")]


def test_prompts_of_all_lengths_make_few_shapes(generate):
    prompts = ["is " * length for length in (1, 90, 3, 40, 7, 41, 2, 5, 60)]

    answers = generate("--batch_size", 2, prompts=prompts)

    assert [answer["prompt"] for answer in answers] == prompts
    results = json.loads(Path("out/generation_results.json").read_text())
    assert results["shapes"] <= 4
    assert results["new_tokens"] == sum(answer["tokens"] for answer in answers)
    assert results["tokens_per_second"] > 0


def test_batches_hold_every_prompt_once_on_widths_that_fit():
    lengths = [1, 300, 16, 17, 64, 65, 250, 8]

    batches = plan_batches(lengths, batch_size=3, bucket_size=-1, max_width=310)

    assert sorted(place for batch in batches for place in batch.places) == list(range(8))
    assert [batch.width for batch in batches] == [16, 66, 300]
    assert [batch.width for batch in plan_batches(lengths, 3, bucket_size=32, max_width=310)] == [31, 95, 310]
    alike = plan_batches([3, 5, 3, 3], 2, bucket_size=32, max_width=310, ignores_padding=True)
    assert [(batch.places, batch.width) for batch in alike] == [([0, 2], 3), ([3], 3), ([1], 5)]
    one_by_one = plan_batches(list(range(1, 201)), batch_size=1, bucket_size=-1, max_width=200)
    assert len({batch.width for batch in one_by_one}) == 5  # as many as 16, 32, ... 256 are
    assert sum(batch.width for batch in one_by_one) == 24000  # powers of two would be 29440
    assert [batch.places for batch in one_by_one] == [[place] for place in range(200)]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_appears_on_the_terminal_piece_by_piece(run, models, plain, monkeypatch, family):
    pieces = []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.write", pieces.append, raising=False)

    flags = ["--model_name_or_path", models / family, "--max_new_tokens", NEW_TOKENS]
    run("run_generation.py", *flags, "--prompt", PROMPTS[1])

    assert "".join(pieces) == PROMPTS[1] + decoding.as_shown(plain[family][1]) + "\n"
    assert len(pieces) > 5


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, "\\x1b[2J\\x9bA\tdone\n"), (False, "\x1b[2J\x9bA\tdone\n")])
def test_a_model_cannot_steer_the_terminal(is_terminal, shown, monkeypatch, capsys):
    said = "\x1b[2J\x9bA\tdone"
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(decoding, "decode_new", lambda tokenizer, prompt, new: said[: len(new)])
    streamer = decoding.TerminalStreamer(tokenizer=None, prompt_ids=[], end_tokens=[])
    for _ in said[:-1]:
        streamer.put(torch.tensor([1]))
    streamer.new_ids += [1]

    streamer.end()

    assert capsys.readouterr().out == shown


def test_nor_can_a_prompt_of_several(run, models, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    flags = ["--model_name_or_path", models / "llama", "--max_new_tokens", NEW_TOKENS, "--batch_size", 2]

    printed = run("run_generation.py", *flags, "--prompt", "Hi\x1b[2J", "You").out

    assert printed.startswith("Hi\\x1b[2J")
    assert "\x1b" not in printed


def test_without_a_terminal_prompts_and_texts_are_printed_in_order(run, models, plain):
    flags = ["--model_name_or_path", models / "llama", "--max_new_tokens", NEW_TOKENS, "--batch_size", 3]

    printed = run("run_generation.py", *flags, "--prompt", *PROMPTS)

    assert printed.out == "".join(f"{prompt}{text}\n\n" for prompt, text in zip(PROMPTS, plain["llama"], strict=True))


def test_a_text_ends_at_the_users_stop_tokens_too(generate, plain):
    assert plain["llama"][0].startswith("er:)#")

    answer = generate("--stop_tokens", "#", ")", prompts=PROMPTS[:1])[0]

    assert (answer["text"], answer["stopped"]) == ("er:", True)


def test_chat_template_wraps_the_prompt_as_a_users_turn(generate):
    wrapped = generate("--use_chat_template", prompts=["Hello"])
    by_hand = generate(prompts=["<s>[INST] Hello [/INST]"], output="by_hand")

    assert texts(wrapped) == texts(by_hand)
    assert wrapped[0]["prompt"] == "Hello"


def test_benchmark_measures_full_length_and_the_second_run_compiles_nothing_new(run, models):
    shutil.copytree(models / "llama", "stops")
    change_json("stops/generation_config.json", stop_strings=["e", "a"])
    flags = ["--model_name_or_path", "stops", "--max_new_tokens", NEW_TOKENS, "--use_hpu_graphs"]
    flags += ["--benchmark", "--n_iterations", 2, "--batch_size", 8, "--prompt", *PROMPTS]

    printed = run("run_generation.py", *flags, "--warmup", 1, "--output_dir", "once").out
    run("run_generation.py", *flags, "--warmup", 3, "--output_dir", "thrice")

    once, thrice = (json.loads(Path(name, "benchmark.json").read_text()) for name in ("once", "thrice"))
    assert once["new_tokens"] == 2 * len(PROMPTS) * NEW_TOKENS
    assert once["graphs"] == thrice["graphs"] > 0
    assert 0 < once["later_token_seconds"] < once["seconds"]
    assert once["tokens_per_second_with_prompt"] > once["tokens_per_second"] > 0
    assert str(once["tokens_per_second"]) in printed


def test_the_guides_command_works_as_it_is_written(models):
    command = [sys.executable, ROOT / "run_generation.py", "--model_name_or_path", f"{models}/llama/"]
    command += ["--use_hpu_graphs", "--use_kv_cache", "--batch_size", "1", "--bf16", "--max_new_tokens", "100"]

    process = subprocess.run([*command, "--prompt", "Here is my prompt"], capture_output=True, text=True, check=True)

    assert process.stdout.startswith("Here is my prompt")
    assert len(process.stdout) > len("Here is my prompt\n\n")
    assert "tokens/s" in process.stderr.splitlines()[-1]


HANGUL_AND_EMOJI = "안녕 👋🏽 你好"


def test_prompt_files_of_other_programs_are_read_and_answers_keep_every_script(generate):
    prompts = [HANGUL_AND_EMOJI, "-v"]
    rows = [{"prompt": prompt} for prompt in prompts]
    Path("bom.txt").write_bytes("\r\n".join(prompts).encode("utf-8-sig"))
    Path("bom.jsonl").write_bytes("\r\n".join(map(json.dumps, rows)).encode("utf-8-sig"))
    Path("texts.json").write_text(json.dumps(prompts, indent=1))
    Path("rows.json").write_text(json.dumps(rows))
    Path("within.json").write_text(json.dumps({"data": rows}))

    answers = generate(f"--prompt={prompts[0]}", "--prompt=-v", "--max_new_tokens", 2, prompts=[])

    assert [answer["prompt"] for answer in answers] == prompts
    assert HANGUL_AND_EMOJI in Path("out/generations.jsonl").read_text(encoding="utf-8")
    shutil.copy("bom.jsonl", "CAPITALS.JSONL")
    for name in ("bom.txt", "bom.jsonl", "texts.json", "rows.json", "within.json", "CAPITALS.JSONL"):
        assert generate("--prompt_file", name, "--max_new_tokens", 2, prompts=[], output=name[:-1]) == answers


DIES_AFTER_A_BATCH = """
import os, signal
from align.generation.keeping import KeptAnswers
from run_generation import main
add = KeptAnswers.add
def add_and_die(self, answers):
    add(self, answers)
    os.kill(os.getpid(), signal.SIGKILL)
KeptAnswers.add = add_and_die
main()
"""


def test_a_run_that_was_killed_goes_on_to_the_file_of_one_that_was_not(models, generate, caplog, monkeypatch):
    flags = ["--batch_size", 3, "--do_sample", "--temperature", "2.0", "--num_return_sequences", 2]
    generate(*flags, output="whole")
    command = ["--model_name_or_path", models / "llama", "--max_new_tokens", NEW_TOKENS, "--output_dir", "out"]
    command = [sys.executable, "-c", DIES_AFTER_A_BATCH, *command, *flags, "--prompt", *PROMPTS]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    killed = subprocess.run(list(map(str, command)), check=False, env=os.environ | {"PYTHONPATH": paths})
    assert killed.returncode == -signal.SIGKILL
    unfinished = Path("out/generations.unfinished.jsonl")
    kept = [json.loads(line) for line in unfinished.read_text().splitlines()]
    assert len(kept) == 6
    with unfinished.open("a") as file:
        file.write('{"number": 3, "prompt": "What i')  # as a kill amid a line leaves it

    with pytest.raises(InputError, match="out holds 6 answers of a run that was not finished; add --resume to go on"):
        generate(*flags)
    with pytest.raises(InputError, match=r"--resume: .*: --temperature was 2.0, now 1.5; --seed was 42, now 7; give"):
        generate(*flags, "--resume", "--temperature", "1.5", "--seed", "7")
    with pytest.raises(InputError, match="--resume: .*: the prompts are others"):
        generate(*flags, "--resume", prompts=[*PROMPTS[:-1], "Hi"])
    with pytest.raises(InputError, match="--resume: .*: the files of --model_name_or_path are others"):
        generate(*flags, "--resume", family="mistral")
    weights = models / "llama" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    os.utime(weights, ns=(written, written + 1))
    with pytest.raises(InputError, match="--resume: .*: the files of --model_name_or_path are others"):
        generate(*flags, "--resume")
    os.utime(weights, ns=(written, written))
    monkeypatch.setattr("align.generation.answers.TOLD_EVERY", 0)
    lines, finish = [], KeptAnswers.finish
    monkeypatch.setattr(
        KeptAnswers, "finish", lambda self: lines.extend(unfinished.read_text().splitlines()) or finish(self)
    )
    answers = generate(*flags, "--resume")

    assert len(list(map(json.loads, lines))) == len(answers), "a second kill would have left a damaged row"
    assert Path("out/generations.jsonl").read_bytes() == Path("whole/generations.jsonl").read_bytes()
    assert kept[0]["text"] == answers[kept[0]["number"] - 1]["text"]
    assert not unfinished.exists()
    assert json.loads(Path("out/generation_results.json").read_text())["answered_before"] == 6
    told = next(message for message in caplog.messages if "are answered" in message)
    assert re.fullmatch(r"6 of 8 prompts are answered, \d+\.\d tokens/s, about \d+ s left", told)
    generate(*flags, "--resume", "auto")
    assert "All 16 answers are in out already." in caplog.text
    with pytest.raises(InputError, match="--output_dir: out holds another run; choose another"):
        generate(*flags)
    monkeypatch.setattr(KeptAnswers, "add", lambda *_: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        generate(*flags, "--overwrite_output_dir")
    assert not Path("out/generations.jsonl").exists(), "the answers of another run would look like this one's"


BAD_INPUT = {
    "--foo 1 --prompt Hi": "unknown argument .--foo.",
    "--prompt Hi --max_new_tokens 0": "--max_new_tokens: got 0; give 1 or more",
    "--prompt Hi --batch_size -1": "--batch_size: got -1",
    "--prompt Hi --temperature 0.7": "--temperature: has an effect only with --do_sample",
    "--prompt Hi --do_sample --temperature -1": "--temperature: got -1; give 0.0001 or more, at most 10000, or 0",
    "--prompt Hi --bucket_internal": "--bucket_internal: needs the size of the buckets",
    "--prompt Hi --max_input_tokens 500": "--max_input_tokens: got 500; .* leaves room for 412",
    "--prompt Hi --use_chat_template --max_input_tokens 4": "prompt 1 has .* tokens in its chat template",
    "--prompt Hi --model_revision v1": "--model_revision: .* is a folder, which has one revision",
    "--prompt Hi --do_sample --top_p 1.5": "--top_p: got 1.5",
    "--prompt Hi --bucket_size 0": "--bucket_size: got 0",
    "--prompt Hi --reuse_cache --use_kv_cache False": "--reuse_cache: contradicts",
    "--prompt Hi --reuse_cache --bucket_size 16": "with --bucket_size add --bucket_internal",
    "--prompt Hi --num_return_sequences 2": "--num_return_sequences: greedy answers are all the same",
    "--prompt Hi --num_return_sequences 3 --num_beams 2": "--num_return_sequences: got 3; --num_beams must be as",
    "--prompt Hi --flash_attention_recompute": "add --use_flash_attention",
    "--prompt Hi --seed -1": "--seed: got -1; give 0 to 4294967295",
    "--prompt Hi --benchmark --ignore_eos False": "--ignore_eos False: a benchmark has texts of one length",
    "--prompt Hi --prompt_file good.jsonl": "--prompt and --prompt_file: give only one source",
    "--prompt_file none.txt": "--prompt_file none.txt: cannot be read",
    "--prompt_file latin.txt": "--prompt_file latin.txt: cannot be read as UTF-8",
    "--prompt_file empty.txt": "--prompt_file empty.txt: holds no prompt",
    "--prompt_file half.jsonl": "--prompt_file half.jsonl, row 2: is not JSON",
    "--prompt_file number.jsonl": "row 1: column 'prompt' is 3, not text",
    "--prompt_file good.jsonl --column_name text": "row 1: has no column 'text' but prompt",
    "--prompt_file surrogate.jsonl": "--prompt_file surrogate.jsonl, row 2: holds half a character",
    "--prompt_file surrogate.json": "--prompt_file surrogate.json, row 1: holds half a character",
    "--prompt_file number.json": "--prompt_file number.json, row 2: got 3, not an object",
    "--prompt_file object.json": "--prompt_file object.json: holds no list of prompts; .* are a .jsonl file",
    "--prompt_file deep.json": "--prompt_file deep.json: is not JSON: ",
    "--prompt_file rows.csv": "--prompt_file rows.csv: .csv files are not read as prompts; give --dataset_name",
    "--prompt Hi --do_sample --temperature 0 --num_return_sequences 2": "--num_return_sequences: greedy answers",
    "--prompt Hi --resume": "--resume: goes on behind .* but there is no --output_dir",
    "--prompt Hi --output_dir new --resume --overwrite_output_dir": "--resume: .* there is --overwrite_output_dir",
    "--prompt Hi --output_dir new --resume --benchmark": "--resume: .* there is a benchmark",
    "--dataset_name good.jsonl --column_name text": "row 1: has no column 'text' but prompt",
    "--dataset_name good.jsonl --dataset_split big": "--dataset_split: 'big' is not in good.jsonl; found train",
    "--dataset_name none.jsonl": "--dataset_name: no such file or folder: none.jsonl",
    "--prompt_file long.txt": "prompt 1: 601 tokens, .* leaves room for 412; shorten",
    "--prompt Hi --stop_tokens <|eot|>": "--stop_tokens: '<.eot.>' is not one token",
    "--prompt Hi --output_dir empty.txt": "--output_dir: empty.txt cannot be made",
    "--prompt Hi --output_dir taken": "--output_dir: taken holds another run",
    "--prompt Hi --peft_model nowhere/none": "--peft_model: nowhere/none is not a folder, and",
    "--prompt Hi --tokenizer_name_or_path taken": "--tokenizer_name_or_path: no tokenizer at taken",
}


@pytest.mark.parametrize("flags", BAD_INPUT)
def test_bad_input_is_one_clear_line(run, models, flags, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("é".encode("latin-1"))
    Path("long.txt").write_text("Hello " * 600)
    Path("half.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "Hi\n')
    write_rows("good.jsonl", [{"prompt": "Hi"}])
    write_rows("number.jsonl", [{"prompt": 3}])
    write_rows("surrogate.jsonl", [{"prompt": "Hi"}, {"prompt": "Hi \ud83d"}])
    Path("surrogate.json").write_text(json.dumps(["Hi \ud83d"]))
    Path("number.json").write_text('["Hi", 3]')
    Path("object.json").write_text('{"prompt": "Hi"}')
    Path("deep.json").write_text("[" * 100_000)
    Path("rows.csv").write_text("prompt\nHi\n")
    write_rows("taken/generations.jsonl", [])

    with pytest.raises(InputError, match=BAD_INPUT[flags]) as error:
        run("run_generation.py", "--model_name_or_path", models / "llama", *flags.split())

    assert "\n" not in str(error.value)


def test_a_folder_of_another_run_or_without_room_is_refused_before_a_model_loads(run, models, monkeypatch):
    flags = ["--model_name_or_path", models / "llama", "--prompt", "Hi", "--output_dir", "out"]
    monkeypatch.setattr("align.generation.probing.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    Path("out").mkdir()
    with open("out/.lock", "w") as held:
        held.write("process 7 on another-host")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another run writes into out \(process 7 on another-host\)"):
            run("run_generation.py", *flags)

    monkeypatch.setattr("align.output.LEAST_FREE", 1 << 60)
    with pytest.raises(InputError, match=r"--output_dir: the disk of out has \d+ MiB left; make room"):
        run("run_generation.py", *flags)


def test_answers_that_the_disk_does_not_take_leave_no_half_file():
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large: 'answers.jsonl'"):
            write_json(Path("answers.jsonl"), [{"text": "long " * 1000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert not list(Path().iterdir())


def test_models_and_adapters_that_are_not_whole_or_do_not_fit_are_told_before_generation(run, models, monkeypatch):
    def fails(message, model, *flags):
        with pytest.raises(InputError, match=message):
            run("run_generation.py", "--prompt", "Hi", "--model_name_or_path", model, *flags)

    fails("is not a folder, and cannot be read from the hub", "stack-llama-2/none")
    shutil.copytree(models / "llama", "cut")
    os.truncate("cut/model.safetensors", 5000)
    fails("cut/model.safetensors is truncated", "cut")
    os.remove("cut/model.safetensors")
    fails("cut has no model.safetensors", "cut")
    shutil.copytree(models / "llama", "deeper")
    change_json("deeper/config.json", num_hidden_layers=3)
    fails("deeper/config.json asks for 3 layers, the files hold 2", "deeper")
    fails("prompt 2: '' has no tokens", models / "gpt2", "--prompt", "")
    fails("--use_chat_template: the tokenizer has no chat template", models / "gpt2", "--use_chat_template")
    fails("adapter does not fit the model", models / "gpt2", "--peft_model", models / "adapter")
    save_model("wide", "llama", "llama-2", hidden_size=128)
    fails("adapter does not fit the model: .*size mismatch", "wide", "--peft_model", models / "adapter")
    monkeypatch.setenv("WORLD_SIZE", "3")
    fails("gaudi_spawn.py --world_size: 3 cards cannot share 2 key/value heads", models / "llama")


def test_bad_input_ends_with_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run_generation.py", "--prompt", "Hi"])

    with pytest.raises(SystemExit) as exit:
        run_script(main)

    assert exit.value.code == 2
    expected = "run_generation.py: error: --model_name_or_path: missing; give a model folder or hub name\n"
    assert capsys.readouterr().err == expected


def test_new_text_keeps_the_blank_that_it_begins_with():
    tokenizer = make_tokenizer("llama-2")
    prompt, new = tokenizer("How are").input_ids, tokenizer("How are you today").input_ids

    assert decode_new(tokenizer, prompt, new[len(prompt) :]) == " you today"
