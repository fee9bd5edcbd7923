"""Commands for optimum-habana's examples. Run: pytest tests/test_upstream_flags.py"""

import io
import json
import logging
import re
from pathlib import Path

import pytest
from conftest import ROOT, write_rows
from tiny import save_model

import run_generation
from align.cli import parse_arguments
from align.errors import InputError
from align.upstream_flags import FLAGS, Instead, Refused, Same, describe, name_as_given, translate

NAMES = dict(line.split(": ") for line in (ROOT / "tests" / "upstream_flags.txt").read_text().splitlines()[1:])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def generate(run, model):
    """Runs run_generation.py on the tiny model; returns what it printed."""

    def generate(*flags):
        return run("run_generation.py", "--model_name_or_path", model, "--max_new_tokens", 4, *flags).out

    return generate


@pytest.fixture
def own_flags(run, capsys):
    """`own_flags(script)` are the flags that this script's parser itself knows."""

    def own_flags(script):
        with pytest.raises(SystemExit):
            run(script, "--help_all" if script in ("sft.py", "dpo.py") else "--help")
        words = capsys.readouterr().out.split()
        return {word.strip(",[]").split("=")[0] for word in words if word.startswith(("--", "[--"))}

    return own_flags


@pytest.mark.parametrize("script", NAMES)
def test_every_flag_of_upstreams_example_is_accepted_replaced_or_refused_by_name(script, own_flags):
    own, flags = own_flags(script), FLAGS[script]

    assert set(NAMES[script].split()) <= set(flags)
    for name, flag in flags.items():
        replaced = [word for word in flag.by.split() if word.startswith("--")] if isinstance(flag, Instead) else []
        for word in replaced + ([f"--{name}"] if isinstance(flag, Same) else []):
            assert word in own, name
        if not isinstance(flag, Same):
            assert f"--{name}" not in own, name


def test_the_page_of_upstreams_flags_is_what_its_command_prints():
    assert (ROOT / "docs" / "upstream.md").read_text() == describe()


@pytest.mark.parametrize(
    "name", [name for name, flag in FLAGS["run_generation.py"].items() if isinstance(flag, Refused)]
)
def test_a_refused_flag_says_why_and_what_works_and_its_neutral_value_passes(name):
    flag = FLAGS["run_generation.py"][name]

    for given in ([f"--{name}"], [f"--{name}", "7"], [f"--{name}=7"], [f"--{name.replace('_', '-')}", "7"]):
        with pytest.raises(InputError, match=f"^--{name[:2]}[^\n`]*; [^\n]+$"):
            translate("run_generation.py", ["--prompt", "Hi", *given, "--bf16"])
    for value in flag.neutral:
        assert translate("run_generation.py", [f"--{name}", value, "--bf16"]) == ["--bf16"]


def test_an_error_about_a_flag_of_ours_names_the_one_that_was_given():
    for words, said in (
        (["--optimizer_type", "wibble"], "--optimizer_type (--optim here): got 'wibble'"),
        (["--optimizer-type=wibble"], "--optimizer_type (--optim here): got 'wibble'"),
        (["--optim", "wibble"], "--optim: got 'wibble'"),
        (["--optimizer_type", "sgd", "--optim", "wibble"], "--optim: got 'wibble'"),
    ):
        assert name_as_given("dpo.py", words, "--optim: got 'wibble'") == said
    assert name_as_given("dpo.py", ["--optimizer_type", "sgd"], "--optim_args: none") == "--optim_args: none"


def test_flags_are_replaced_by_ours_and_all_other_words_stay_as_they_are(caplog):
    def dpo(*arguments):
        return translate("dpo.py", list(arguments))

    assert dpo("--optimizer_type", "adamw_torch", "--beta=0.1") == ["--optim", "adamw_torch", "--beta=0.1"]
    assert dpo("--sanity_check", "--seed", "1") == ["--max_train_samples", "1000", "--seed", "1"]
    assert dpo("--sanity_check", "False") == []
    assert dpo("--ignore_bias_buffers=True") == ["--ddp_broadcast_buffers", "False"]
    reentrant = ["--gradient_checkpointing_kwargs", '{"use_reentrant":false}']
    assert dpo("--gradient_checkpointing_use_reentrant", "False") == reentrant
    for switch in ("sanity_check", "ignore_bias_buffers", "gradient_checkpointing_use_reentrant"):
        with pytest.raises(InputError, match=f"^--{switch}: got maybe; give True or False$"):
            dpo(f"--{switch}", "maybe")
    with pytest.raises(InputError, match="^--no-ignore_eos: got False; it takes no value$"):
        translate("run_generation.py", ["--no-ignore_eos", "False"])
    assert caplog.text == ""
    assert dpo("--log_freq", "1") == []
    assert "--log_freq has no effect; upstream never uses it either; --logging_steps" in caplog.text
    words = ["--prompt", "-d is no flag here", "", "--temperature", "-1", "--prompt=--trim_logits"]
    assert translate("run_generation.py", ["-d", "hpu", *words, "--local_rank=0", "--trim_logits"]) == words
    with pytest.raises(InputError, match="--device: got cpu; only hpu works here"):
        translate("run_generation.py", ["--device", "cpu"])


def test_dpos_flags_of_upstream_say_what_ours_say(monkeypatch):
    import dpo

    def parse(*flags):
        monkeypatch.setattr("sys.argv", ["dpo.py", "--model_name_or_path", "m", "--logging_dir", "logs", *flags])
        parsed = parse_arguments(dpo.ARGUMENTS, "", dpo.RECIPE)
        return {name: str(value) for arguments in parsed for name, value in vars(arguments).items()}

    upstream = ["--optimizer_type", "adamw_torch", "--sanity_check", "--ignore_bias_buffers", "--log_freq", "1"]
    upstream += ["--gradient_checkpointing", "--gradient_checkpointing_use_reentrant", "True"]
    ours = ["--optim", "adamw_torch", "--max_train_samples", "1000", "--ddp_broadcast_buffers", "False"]
    ours += ["--gradient_checkpointing", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}']

    assert parse(*upstream) == parse(*ours) != parse()
    assert parse(*upstream)["gradient_checkpointing_kwargs"] == "{'use_reentrant': True}"


def test_the_flags_of_published_commands_pass_or_are_refused_where_they_cannot_work():
    for line in (ROOT / "tests" / "published_flags.txt").read_text().splitlines()[1:]:
        names = re.findall(r"--([\w-]+)", line)
        refused = [name for name in names if isinstance(FLAGS["run_generation.py"].get(name), Refused)]
        if refused:
            with pytest.raises(InputError, match=f"^--({'|'.join(refused)}): not here"):
                run_generation.parse_arguments(line.split())
            continue
        model, _, decoding, gaudi, output, _ = run_generation.parse_arguments([*line.split(), "--peft_model", "x"])
        run_generation.check_arguments(model, decoding, gaudi, output)


# Flags as published commands combine them, and what is told besides
PUBLISHED = {
    "--use_hpu_graphs --use_kv_cache --max_new_tokens 4 --do_sample --prompt Hi": "",
    "--bf16 --use_hpu_graphs --trim_logits --attn_softmax_bf16 --use_flash_attention --flash_attention_recompute "
    "--max_input_tokens 24 --bucket_size 16 --bucket_internal --limit_hpu_graphs --batch_size 4 --sdp_on_bf16 "
    "--flash_attention_causal_mask --n_iterations 1 --warmup 0 --attn_batch_split 2": "eight sentences of our own",
    "--device hpu --local_rank 0 --parallel_strategy none --attn_implementation eager --verbose_workers --ignore_eos "
    "--show_graphs_count --limit_hpu_graph --prompt Hi --model_revision main --token x": "graphs were compiled",
    "--temperature 0 --do_sample --prompt Hi": "",
    "--temperature 1.0 --top_p 1.0 --prompt Hi": "",
    "--attn_softmax_bf16 --prompt Hi": "--attn_softmax_bf16 has no effect in float32",
    "--use_flash_attention --flash_attention_fast_softmax --prompt Hi": "",
    "--limit_hpu_graphs --prompt Hi": "--limit_hpu_graphs has no effect",
    "--max_input_tokens 3 --prompt Hello-you-and-me": "the end of 1 of 1 prompts is cut off",
    "--dataset_name rows.jsonl --dataset_max_samples 1": "",
}


@pytest.mark.parametrize("flags", PUBLISHED)
def test_published_commands_run(generate, flags, caplog, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    caplog.set_level(logging.INFO)
    write_rows("rows.jsonl", [{"id": 1, "question": "How are you?"}, {"id": 2, "question": "And you?"}])

    printed = generate(*flags.split())

    assert printed
    assert PUBLISHED[flags] in caplog.text
    assert "And you?" not in printed


def test_temperature_0_is_greedy_and_ignore_eos_writes_on(generate, model):
    greedy = generate("--prompt", "Hi")

    assert generate("--prompt", "Hi", "--do_sample", "--temperature", 0) == greedy
    config = json.loads((model / "generation_config.json").read_text())
    generate("--prompt", "Hi", "--output_dir", "all", "--ignore_eos", "--stop_tokens", *"abcdefghijklmnopqrstuvwxyz")
    answer = json.loads(Path("all/generations.jsonl").read_text())
    assert (answer["tokens"], answer["stopped"]) == (4, False), config


def test_a_benchmark_writes_upstreams_results_of_a_full_batch(generate):
    generate("--n_iterations", 2, "--warmup", 1, "--batch_size", 3, "--prompt", "Hello", "Hi", "--output_dir", "out")

    results = json.loads(Path("out/results.json").read_text())
    assert results["input"] == [["Hello"], ["Hi"], ["Hello"]]
    assert [output[0].startswith(("Hello", "Hi")) for output in results["output"]] == [True] * 3
    assert results["output"][0] == results["output"][2]
    assert results["throughput"] == json.loads(Path("out/benchmark.json").read_text())["tokens_per_second"] > 0
    assert 0 < results["avg_first_token_latency"] < results["avg_e2e_latency"]


def test_a_benchmark_of_prompts_of_ones_own_shows_the_answers(generate, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    flags = ["--n_iterations", 2, "--warmup", 0, "--batch_size", 3]

    printed = generate(*flags, "--prompt", "Hello", "Hi")

    assert printed.startswith(generate("--prompt", "Hello", "Hi", "--ignore_eos"))
    assert generate(*flags).startswith("version ")


def test_flags_of_speed_that_a_model_has_nothing_for_are_told(run, tmp_path, caplog):
    model = save_model(tmp_path / "gemma", "gemma", head_dim=16)
    ask = ["--model_name_or_path", model, "--max_new_tokens", 4, "--prompt", "Hi"]
    flags = "--reuse_cache --bucket_size 16 --bucket_internal --use_flash_attention"

    texts = [run("run_generation.py", *ask, *given).out for given in (flags.split(), [])]

    assert texts[0] == texts[1]
    told = "--reuse_cache, --bucket_size, --bucket_internal have no effect: gemma models run without static shapes."
    assert told in caplog.messages
    assert "--use_flash_attention has no effect: optimum-habana's gemma models have none." in caplog.messages


def test_an_adapter_of_prompts_is_refused_as_it_changes_no_weights(generate, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))

    with pytest.raises(InputError, match="is a PROMPT_TUNING adapter, which changes no weights but needs tokens"):
        generate("--peft_model", tmp_path, "--prompt", "Hi")


def test_a_causal_mask_alone_is_refused_where_a_prompt_would_be_padded(generate):
    flags = ["--use_flash_attention", "--flash_attention_causal_mask", "--prompt", "Hello", "Hello you, and me"]

    alone = generate(*flags)

    assert alone == generate("--prompt", "Hello", "Hello you, and me")
    with pytest.raises(InputError, match="--flash_attention_causal_mask: forgets padding, and prompt 1 of 2 tokens"):
        generate(*flags, "--batch_size", 2)
    with pytest.raises(InputError, match="--flash_attention_causal_mask: .* padded to 32"):
        generate(*flags, "--max_input_tokens", 32)


def test_fp8_by_variable_is_refused(generate, monkeypatch):
    monkeypatch.setenv("QUANT_CONFIG", "quantization_config/maxabs_quant.json")

    with pytest.raises(InputError, match="QUANT_CONFIG: not here, as FP8 needs .*; unset it"):
        generate("--prompt", "Hi")
