"""What a generation_config.json, beams and several answers do to texts. Run: pytest tests/test_decoding.py"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from plain_generation import END_TOKENS
from tiny import save_model
from transformers import AutoTokenizer, GenerationConfig

from align.errors import InputError
from align.generation.config import DecodingArguments, GaudiArguments, check_fields, make_generator
from align.generation.model import ModelArguments, load_model
from align.generation.stepping import StaticShapes
from align.upstream_fixes import adapt_transformers

PROMPTS = ["Hello", "What is the capital of France? It is", "two and two and two and two", "is"]
NEW_TOKENS = 12
# name: fields of generation_config.json, with the values of transformers' generate
FIELDS = {
    "plain": {},
    "suppress_tokens": {"suppress_tokens": list(range(0, 300, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 500, 3))},
    "sequence_bias": {"sequence_bias": [[[65], 9.0], [[65, 70], 50.0], [[70, 65, 71], 90.0]]},
    "bad_words_ids": {"bad_words_ids": [[number] for number in range(0, 400, 3)] + [[7, 8]]},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "sequence_bias": [[[65], 9.0], [[66], 9.0]]},
    "min_new_tokens": {"min_new_tokens": 9},
    "min_length": {"min_length": 14},
    "forced_eos_token_id": {"forced_eos_token_id": 9, "min_new_tokens": NEW_TOKENS},
    "stop_strings": {"stop_strings": ["e", "or"]},
    "stop_strings, from the prompt on": {"stop_strings": ["oWh"]},
    "repetition_penalty": {"repetition_penalty": 9.0, "no_repeat_ngram_size": 4, "min_new_tokens": 10},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 0.5},
    "beams": {"num_beams": 3},
    "beams, long": {"num_beams": 3, "length_penalty": 3.0},
    "beams, early": {"num_beams": 3, "early_stopping": True},
    "beams, never early": {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0},
    "beams, n-grams": {"num_beams": 3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    "beams, strings": {"num_beams": 4, "stop_strings": ["a", "th"]},
    "beams, several": {"num_beams": 4, "num_return_sequences": 3},
}
# name: fields for which the scores of the first sampled token are compared
SCORES = {
    "temperature": {"temperature": 0.4},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.5},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "all": {"temperature": 1.7, "top_k": 90, "top_p": 0.95, "min_p": 0.002, "typical_p": 0.9, "eta_cutoff": 0.002}
    | {"repetition_penalty": 1.5, "renormalize_logits": True, "suppress_tokens": list(range(0, 500, 7))},
}
FLAGS = ("num_beams", "num_return_sequences")  # the user says these


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    adapt_transformers()  # before transformers' Auto classes have seen, and remembered, a model of its own
    folder = save_model(tmp_path_factory.mktemp("decoding") / "model", initializer_range=0.2)
    write_config(folder, eos_token_id=list(END_TOKENS))
    return folder


def write_config(folder, **fields):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def plain(model):
    """What plain transformers say, by the names of FIELDS."""
    jobs = [
        {"model": str(model), "prompts": PROMPTS, "options": {"max_new_tokens": NEW_TOKENS} | fields}
        for fields in FIELDS.values()
    ]
    sampled = {"do_sample": True, "top_k": 0}
    jobs += [
        {"model": str(model), "prompts": PROMPTS, "options": sampled | fields, "scores": True}
        for fields in SCORES.values()
    ]
    (model.parent / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, ROOT / "tests" / "plain_generation.py", model.parent / "jobs.json"]
    texts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return dict(zip([*FIELDS, *(f"scores: {name}" for name in SCORES)], texts, strict=True))


@pytest.fixture
def generate(run):
    """Texts that run_generation.py writes for PROMPTS."""

    def generate(folder, *flags):
        options = ["--max_new_tokens", NEW_TOKENS, "--output_dir", "out", "--batch_size", 3, "--prompt", *PROMPTS]
        run("run_generation.py", "--model_name_or_path", folder, *options, *flags)
        return [json.loads(line)["text"] for line in Path("out/generations.jsonl").read_text().splitlines()]

    return generate


def with_fields(model, name):
    """A copy of the model with those fields, and the flags that say the others."""
    folder = Path(shutil.copytree(model, "model"))
    write_config(folder, **{field: value for field, value in FIELDS[name].items() if field not in FLAGS})
    flags = [(f"--{field}", value) for field, value in FIELDS[name].items() if field in FLAGS]
    return folder, [part for flag in flags for part in flag]


@pytest.mark.parametrize("name", FIELDS)
def test_texts_are_those_of_plain_transformers(name, model, plain, generate):
    folder, flags = with_fields(model, name)
    assert generate(folder, *flags, "--use_hpu_graphs") == plain[name]
    assert name in ("plain", "beams, early") or plain[name] != plain["plain"], "the field has to matter"


def test_the_tokenizers_end_ends_a_text_although_the_model_names_another_one(model, generate):
    folder = Path(shutil.copytree(model, "model"))
    end = AutoTokenizer.from_pretrained(model).eos_token_id
    write_config(folder, eos_token_id=end + 1, sequence_bias=[[[end], 100.0]])

    generate(folder)

    answers = [json.loads(line) for line in Path("out/generations.jsonl").read_text().splitlines()]
    assert [(answer["tokens"], answer["stopped"]) for answer in answers] == [(1, True)] * len(PROMPTS)


@pytest.mark.parametrize("way", [["--reuse_cache"], ["--bucket_size", 16], ["--reuse_cache", "--use_hpu_graphs"]])
def test_beams_are_the_same_in_every_cache(way, model, plain, generate):
    folder, flags = with_fields(model, "beams, n-grams")
    assert generate(folder, *flags, *way) == plain["beams, n-grams"]


def test_a_reused_cache_in_buckets_says_the_same(model, plain, generate):
    way = ["--reuse_cache", "--bucket_size", 16, "--bucket_internal", "--use_hpu_graphs"]
    assert generate(model, *way) == plain["plain"]


@pytest.mark.parametrize("field", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"epsilon_cutoff": 0.999}])
def test_sampling_among_one_token_is_greedy(field, model, plain, generate):
    folder = Path(shutil.copytree(model, "model"))
    write_config(folder, do_sample=True, **{"top_k": 0} | field)
    assert generate(folder, "--do_sample", "--seed", 3) == plain["plain"]


@pytest.fixture(scope="module")
def loaded(model):
    adapt_transformers()
    return load_model(model, None, 512, ModelArguments(), world_size=1, use_hpu_graphs=False, longest=64)


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_are_sampled_from_are_those_of_plain_transformers(name, model, loaded, plain, monkeypatch):
    for field, value in ({"top_k": 0} | SCORES[name]).items():
        monkeypatch.setattr(loaded.generation_config, field, value, raising=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    flags = DecodingArguments(max_new_tokens=1, do_sample=True)
    generator = make_generator(loaded, tokenizer, flags, GaudiArguments(), set(), rows=len(PROMPTS))
    encoded = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    texts = generator.lay_out(encoded, 32)

    with torch.inference_mode():
        scores = generator.process(texts, generator.forward(texts, 0), 0).cpu()

    right = torch.tensor(plain[f"scores: {name}"])
    torch.testing.assert_close(scores, right, rtol=1e-4, atol=1e-4)
    assert name == "temperature" or (right == -torch.inf).any()


def test_scores_that_are_no_numbers_stop_a_run_unless_the_model_says_that_they_are_removed(
    model, loaded, plain, monkeypatch
):
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = [tokenizer(prompt).input_ids for prompt in PROMPTS[:1]]
    forward = StaticShapes._forward

    def spoil(*args, **kwargs):
        logits, past = forward(*args, **kwargs)
        logits[:, 400] = torch.nan
        return logits, past

    def generate():
        generator = make_generator(loaded, tokenizer, DecodingArguments(max_new_tokens=4), GaudiArguments(), set())
        return generator.generate(encoded, 8)[0]

    right = generate()
    monkeypatch.setattr(StaticShapes, "_forward", spoil)

    with pytest.raises(InputError, match="the model gives NaN for scores"):
        generate()
    monkeypatch.setattr(loaded.generation_config, "remove_invalid_values", True)
    assert generate() == right  # 0 where NaN was, which is not the most


def test_fields_that_change_nothing_are_named_and_a_temperature_of_0_is_greedy(model, plain, generate, caplog):
    folder = Path(shutil.copytree(model, "model"))
    write_config(folder, guidance_scale=2.0, watermarking_config={"bias": 3.0}, temperature=0.0, num_beam_groups=2)
    write_config(folder, of_another_release=3)

    assert generate(folder, "--do_sample") == plain["plain"]

    said = [message for message in caplog.messages if "generation_config.json" in message]
    assert said == [
        "The model's generation_config.json: guidance_scale, num_beam_groups, of_another_release, watermarking_config "
        "have no effect here.",
        "The model's generation_config.json: a temperature of 0 is greedy; --temperature 1 samples.",
    ]


WRONG_FIELDS = {
    "top_k": -5,
    "min_p": 2.0,
    "temperature": "hot",
    "no_repeat_ngram_size": 1.5,
    "bad_words_ids": [[]],
    "suppress_tokens": 5,
    "sequence_bias": {"5": 2.0},
    "repetition_penalty": 0,
    "eos_token_id": "</s>",
    "min_length": "9",
    "stop_strings": "",
    "length_penalty": "x",
}


def test_values_that_no_text_can_follow_are_refused_by_name(model, loaded):
    for name, value in WRONG_FIELDS.items():
        changed = SimpleNamespace(generation_config=GenerationConfig(), name_or_path="here")
        setattr(changed.generation_config, name, value)
        with pytest.raises(InputError, match=f"generation_config.json of here: {name} is "):
            check_fields(changed)
    check_fields(loaded)


def test_a_generation_config_that_leaves_no_token_to_say_is_refused(model, generate):
    folder = Path(shutil.copytree(model, "model"))
    write_config(folder, suppress_tokens=list(range(512)))
    with pytest.raises(InputError, match="generation_config.json of .*: suppress_tokens leaves no token to say"):
        generate(folder, "--do_sample")


@pytest.mark.parametrize("length", [1, 2], ids=["a token", "two tokens"])
def test_bad_words_are_not_said(length, model, plain, generate):
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = [tokenizer(text, add_special_tokens=False).input_ids for text in plain["plain"]]
    spans = [ids[first : first + length] for ids in said for first in range(1, len(ids) - length + 1)]
    words = [(ids, tokenizer.decode(ids).strip()) for ids in spans]
    forms = [(ids, word, form) for form in (" ", "") for ids, word in words if word.isalnum()]
    word, said = next(
        (w, ids) for ids, w, form in forms if tokenizer(form + w, add_special_tokens=False).input_ids == ids
    )
    folder = Path(shutil.copytree(model, "model"))
    write_config(folder, bad_words_ids=[said])

    texts = generate(model, "--bad_words", word)
    own_words = generate(folder, "--bad_words", "wibble", "--overwrite_output_dir")

    assert any(word in text for text in plain["plain"])
    assert not any(word in text for text in [*texts, *own_words])


def test_answers_are_several(model, generate):
    said = generate(model, "--do_sample", "--num_return_sequences", 3, "--seed", 1)

    assert len(said) == 3 * len(PROMPTS)
    assert len(set(said[:3])) > 1


def test_a_blank_is_no_bad_word(model, generate):
    with pytest.raises(InputError, match="--bad_words: got a word without letters"):
        generate(model, "--bad_words", "the", " ")


def test_several_greedy_answers_are_refused(model, generate):
    with pytest.raises(InputError, match="--num_return_sequences: greedy answers are all the same; add --do_sample"):
        generate(model, "--num_return_sequences", 2)
    with pytest.raises(InputError, match="--num_return_sequences: got 4; --num_beams must be as many"):
        generate(model, "--num_return_sequences", 4, "--num_beams", 3)


@pytest.mark.parametrize("flags", [[], ["--num_beams", 3]], ids=["greedy", "beams"])
def test_graphs_do_not_grow_in_number_with_the_steps(flags, model, run, caplog):
    for steps in (4, 16):
        options = ["--prompt", *PROMPTS, "--batch_size", 4, "--use_hpu_graphs", "--ignore_eos", *flags]
        options += ["--output_dir", f"out{steps}", "--show_graphs_count", "--max_new_tokens", steps]
        run("run_generation.py", "--model_name_or_path", model, *options)
    few, many = [message for message in caplog.messages if message.endswith("graphs were compiled.")]
    assert few == many
