"""Model folders from strangers and from damaged disks: `pytest tests/test_guard.py`."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_rows
from tiny import save_model
from transformers import AutoConfig, AutoModelForCausalLM

from align.errors import InputError
from align.models import guard
from align.upstream_fixes import adapt_transformers

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class Evil(LlamaConfig):
    pass


class EvilModel(LlamaForCausalLM):
    config_class = Evil
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def copy(model):
    shutil.copytree(model, "model")
    return Path("model")


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that code of the folder `evil` writes when it runs."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the next test's code may be as long, and as old in seconds
    marker = tmp_path / "ran"
    Path("evil").mkdir()
    Path("evil/code.py").write_text(CODE.format(marker=str(marker)))
    change("evil/config.json", model_type="evil", auto_map={"AutoConfig": "code.Evil"})
    return marker


def change(path, **values):
    """Sets entries of a JSON file; None takes one out."""
    path = Path(path)
    content = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def write_lightglue(folder):
    """The folder of CVE-2026-5241: an innocent type whose nested configuration leads to another folder's code."""
    nested = {"model_type": "evil", "_name_or_path": str(Path("evil").resolve())}
    change(folder / "config.json", model_type="lightglue", trust_remote_code=True, keypoint_detector_config=nested)


def command(script, model, *flags):
    """A whole command line of that script with `model` as the one that it reads."""
    write_rows("rows.jsonl", [{"question": "Who?", "answer": "Me."}] * 8)
    write_rows("pairs.jsonl", [{"question": "Who?", "response_j": "Me.", "response_k": "You."}] * 8)
    train = ["--output_dir", "out", "--max_steps", "1"]
    return {
        "sft.py": [*("--model_name_or_path", model, "--dataset_name", "rows.jsonl", "--do_train"), *train, *flags],
        "dpo.py": [*("--model_name_or_path", model, "--dataset_name", "pairs.jsonl"), *train, *flags],
        "run_generation.py": ["--model_name_or_path", model, "--prompt", "Hi", *flags],
        "merge_peft_adapter.py": [
            "--adapter_model_name",
            "adapter",
            "--base_model_name",
            model,
            "--output_name",
            "out",
        ],
    }[script]


def write_adapter(folder="adapter", base="model", **values):
    """A LoRA adapter of all-zero tensors for the query projections of `model`."""
    from safetensors.torch import save_file

    Path(folder).mkdir()
    known = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    change(f"{folder}/adapter_config.json", **known, base_model_name_or_path=base, **values)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 64), "B": (64, 2)}
    tensors = {name.format(layer, part): torch.ones(shape) for layer in (0, 1) for part, shape in shapes.items()}
    save_file(tensors, f"{folder}/adapter_model.safetensors")


def fails(run, message, script, *arguments):
    with pytest.raises(InputError, match=message) as error:
        run(script, *arguments)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- code


def test_transformers_itself_still_runs_code_of_a_nested_configuration(copy, marker):
    write_lightglue(copy)

    AutoConfig.from_pretrained(copy)

    assert marker.exists()  # once it does not, this reason is gone


SCRIPTS = ("sft.py", "dpo.py", "run_generation.py", "merge_peft_adapter.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_runs_code_that_a_nested_configuration_leads_to(run, copy, marker, script):
    write_lightglue(copy)
    write_adapter()

    fails(run, r"model/config.json (sets trust_remote_code|leads to another model)", script, *command(script, copy))

    assert not marker.exists()


def test_neither_reference_nor_second_model_nor_tokenizer_nor_an_adapters_base_runs_code(run, model, copy, marker):
    write_lightglue(copy)
    write_adapter()
    message = "model/config.json (sets trust_remote_code|leads to another model)"

    fails(run, f"--ref_model: {message}", "dpo.py", *command("dpo.py", model, "--ref_model", copy))
    flags = ["--chat", "--compare", copy]
    fails(run, f"--compare: {message}", "run_generation.py", "--model_name_or_path", model, *flags)
    fails(run, message, "run_generation.py", "--peft_model", "adapter", "--prompt", "Hi")
    fails(run, message, "merge_peft_adapter.py", "--adapter_model_name", "adapter", "--output_name", "out")
    for script in ("sft.py", "run_generation.py"):
        flags = ["--tokenizer_name_or_path", copy]
        fails(run, f"--tokenizer_name_or_path: {message}", script, *command(script, model, *flags))

    assert not marker.exists()


EVIL = {"AutoConfig": "code.Evil", "AutoModelForCausalLM": "code.EvilModel"}
TYPE = {"model_type": "evil"}
WAYS = {
    "code of its own": ("config.json", {"auto_map": EVIL} | TYPE, "asks to run code that comes with it"),
    "a type of its own": ("config.json", TYPE, "is a 'evil' model, which the installed transformers does not know"),
    "code of a tokenizer": (
        "tokenizer_config.json",
        {"auto_map": {"AutoTokenizer": ["code.Evil", None]}},
        "asks to run",
    ),
    "code of a processor": ("preprocessor_config.json", {"auto_map": {"AutoProcessor": "code.Evil"}}, "asks to run"),
    "code of another repository": (
        "config.json",
        {"auto_map": {"AutoConfig": "evil--code.Evil"}} | TYPE,
        "asks to run code",
    ),
    "code inside": ("config.json", {"parts": {"model_type": "llama", "auto_map": EVIL}}, "asks to run code"),
    "a nested model": ("config.json", {"text_config": {"_name_or_path": "evil"}}, "leads to another model"),
    "one in a list": ("config.json", {"parts": [{"x": {"_name_or_path": "evil"}}]}, r"another model \(parts.0.x"),
    "trust of its own": ("config.json", {"trust_remote_code": True}, "sets trust_remote_code itself"),
    "attention of the hub": ("config.json", {"attn_implementation": "kernels-community/flash-attn"}, "from the hub"),
    "the same inside": ("config.json", {"_attn_implementation_internal": {"": "a/b:c"}}, "attention code from the hub"),
    "another configuration": ("config.json", {"configuration_files": ["config.4.0.0.json"]}, "leads to other files"),
    "other weights": ("config.json", {"transformers_weights": "../evil.safetensors"}, "leads to other files"),
    "a picture model": ("config.json", {"model_type": "gemma3"}, "is a gemma3 model; give a causal language model"),
    "an encoder": ("config.json", {"model_type": "bert"}, "is a bert model; give a causal language model"),
    "a translator": ("config.json", {"is_encoder_decoder": True}, "give a causal language model"),
    "no type but a name": ("config.json", {"model_type": None}, "has no model_type"),
    "an adapter beside it": (
        "adapter_config.json",
        {"base_model_name_or_path": "evil"},
        "holds a model and an adapter",
    ),
    "quantised weights": ("config.json", {"quantization_config": {"quant_method": "awq"}}, r"is quantised \(awq\)"),
    "sizes that are words": (
        "config.json",
        {"hidden_size": "wide"},
        "hidden_size is 'wide', not a whole number above 0",
    ),
    "broken JSON": ("generation_config.json", "{", "is not valid JSON"),
    "JSON without end": ("config.json", "[" * 100_000, "is not valid JSON"),
    "a list": ("config.json", "[]", "holds a list where a JSON object is expected"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_that_leads_elsewhere_or_is_no_causal_language_model_is_refused(run, copy, marker, way):
    file, content, message = WAYS[way]
    shutil.copy("evil/code.py", copy)
    change(copy / file, **content) if isinstance(content, dict) else (copy / file).write_text(content)

    fails(run, message, "sft.py", *command("sft.py", copy))

    assert not marker.exists()


def test_code_beside_a_model_that_transformers_knows_is_not_run_and_that_is_told(run, copy, marker, caplog):
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change(copy / "config.json", auto_map=dict.fromkeys(names, "code.Evil"))
    shutil.copy("evil/code.py", copy)
    write_adapter(init_lora_weights="pissa")  # not streamed: through PEFT

    for script in ("sft.py", "run_generation.py"):
        caplog.clear()
        guard._warn_once.cache_clear()
        said = run(script, *command(script, copy)).err + caplog.text
        assert said.count("which is not run: transformers' own class of a llama model is") == 1
    run("dpo.py", *command("dpo.py", copy, "--ref_model", copy, "--overwrite_output_dir"))
    run("merge_peft_adapter.py", *command("merge_peft_adapter.py", copy)[:-1], "merged")

    assert not marker.exists()


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(run, copy):
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    fails(run, "config.json is not a file", "sft.py", *command("sft.py", copy))


def test_code_that_the_user_trusts_runs(run, copy, marker):
    change(copy / "config.json", auto_map={"AutoConfig": "code.Evil"})
    shutil.copy("evil/code.py", copy)
    flags = ["--trust_remote_code", "--show_examples", 1]
    fails(run, "brings code for a configuration and none for a causal", "sft.py", *command("sft.py", copy, *flags))

    change(copy / "config.json", auto_map=EVIL)
    run("sft.py", *command("sft.py", copy, *flags))

    assert marker.exists()


def test_code_of_a_tokenizer_alone_may_be_trusted(run, copy, marker):
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Evil"]})
    shutil.copy("evil/code.py", copy)
    ask = command("run_generation.py", copy)
    fails(run, "tokenizer_config.json asks to run code", "run_generation.py", *ask)
    assert not marker.exists()

    with contextlib.suppress(TypeError):  # what that code makes is no tokenizer
        run("run_generation.py", *ask, "--trust_remote_code_tokenizer")

    assert marker.exists()


def test_an_adapters_settings_import_nothing(run, copy, marker):
    write_adapter(megatron_config={"x": 1}, megatron_core="code")
    for flags in (["--peft_model", "adapter", "--prompt", "Hi"], ["--chat", "--compare", "adapter"]):
        fails(run, "is made for Megatron", "run_generation.py", *flags, "--model_name_or_path", copy)
    fails(run, "is made for Megatron", "merge_peft_adapter.py", *command("merge_peft_adapter.py", copy))


# ---------------------------------------------------------------- weights


def change_weights(folder, change):
    """Applies `change` to the dictionary of tensors in model.safetensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def forget_metadata(folder):
    from safetensors import safe_open

    write_index(folder, "model-1.safetensors")
    with safe_open(folder / "model-1.safetensors", "pt") as file:
        change(folder / "model.safetensors.index.json", weight_map=dict.fromkeys(file.keys(), "model-1.safetensors"))


def name_another_library(folder):
    from safetensors.torch import load_file, save_file

    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"format": "tf"})


def write_index(folder, place):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    change(folder / "model.safetensors.index.json", weight_map={UP: place, "lm_head.weight": "model-1.safetensors"})


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def write_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Runs()}, folder / "pytorch_model.bin")


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "more layers than the files hold": (
        lambda folder: change(folder / "config.json", num_hidden_layers=4),
        "asks for 4 layers, the files hold 2: there is nothing of layer 2",
    ),
    "fewer layers": (
        lambda folder: change(folder / "config.json", num_hidden_layers=1),
        r"config.json leaves out 9 tensors that the files hold, such as model.layers.1",
    ),
    "another size": (
        lambda folder: change(folder / "config.json", intermediate_size=96),
        r"mlp.\w+.weight is (128 x 64|64 x 128), config.json makes it (96 x 64|64 x 96)",
    ),
    "a tensor is missing": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop(UP)),
        f"no weights for 1 of the 21 tensors that its config.json asks for, such as {UP}",
    ),
    "the head is missing": (
        lambda folder: change_weights(folder, lambda tensors: tensors.pop("lm_head.weight")),
        "such as lm_head.weight",
    ),
    "one NaN": (
        lambda folder: change_weights(folder, lambda tensors: tensors[UP][127].fill_(torch.nan)),
        f"{UP} holds NaN or infinity",
    ),
    "one infinity": (
        lambda folder: change_weights(folder, lambda tensors: tensors["model.norm.weight"][3:4].fill_(-torch.inf)),
        "model.norm.weight holds NaN or infinity",
    ),
    "integers": (
        lambda folder: change_weights(folder, lambda tensors: tensors.update({UP: tensors[UP].to(torch.int8)})),
        rf"{UP} is quantised \(I8\)",
    ),
    "cut short": (lambda folder: os.truncate(folder / "model.safetensors", 9999), "is truncated or damaged"),
    "gone": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors or pytorch_model.bin"),
    "an index that leaves the folder": (
        lambda folder: write_index(folder, "../evil/x.safetensors"),
        "leaves the folder",
    ),
    "an index without files": (lambda folder: write_index(folder, ["x"]), 'has no "weight_map" of files'),
    "an index that says nothing about itself": (forget_metadata, 'index.json has no object "metadata"; add it'),
    "weights for TensorFlow": (name_another_library, r"is of another library than torch \(format: tf\)"),
    "a pickle that runs code": (write_pickle, "holds more than tensors, which may be code"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_one_line_before_anything_is_loaded(run, copy, damage, monkeypatch):
    from transformers import PreTrainedModel

    make, message = DAMAGES[damage]
    make(copy)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))

    fails(run, message, "sft.py", *command("sft.py", copy))
    fails(run, message, "run_generation.py", *command("run_generation.py", copy))

    assert not Path("ran").exists()


def test_a_damaged_reference_and_a_damaged_adapter_are_told_too(run, model, copy):
    write_adapter()
    DAMAGES["one NaN"][0](copy)
    fails(run, f"--ref_model: .*{UP} holds NaN", "dpo.py", *command("dpo.py", model, "--ref_model", copy))
    adapter = torch.full((2, 64), torch.nan)
    from safetensors.torch import load_file, save_file

    tensors = load_file("adapter/adapter_model.safetensors")
    save_file(tensors | {next(iter(tensors)): adapter}, "adapter/adapter_model.safetensors")
    flags = ["--peft_model", "adapter"]
    fails(run, "--peft_model: adapter/.* holds NaN", "run_generation.py", *command("run_generation.py", model, *flags))


def test_a_head_that_a_tied_model_does_not_use_is_told_by_all_and_one_like_the_embedding_is_not(run, copy, caplog):
    write_adapter()
    change(copy / "config.json", tie_word_embeddings=True)
    for script in SCRIPTS:
        guard._warn_once.cache_clear()
        caplog.clear()
        again = ["--overwrite_output_dir"] if script == "dpo.py" else []
        asked = [word if "merge" not in script or word != "out" else "merged" for word in command(script, copy)]
        said = run(script, *asked, *again).err + caplog.text
        assert said.count("model stores two tensors, model.embed_tokens.weight and lm_head.weight, where") == 1

    change_weights(copy, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    guard._warn_once.cache_clear()
    caplog.clear()
    guard.check_weights(copy, guard.load_config(copy, "--model"), "--model")
    assert "two tensors" not in caplog.text


def test_a_merge_refuses_a_base_without_the_head_that_its_configuration_wants(run, copy):
    write_adapter()
    DAMAGES["the head is missing"][0](copy)
    fails(run, "holds no head beside model.embed", "merge_peft_adapter.py", *command("merge_peft_adapter.py", copy))


def test_a_merge_refuses_a_base_with_fewer_layers_than_its_configuration(run, copy):
    write_adapter()
    change(copy / "config.json", num_hidden_layers=4)
    fails(run, "asks for 4 layers, the files hold 2", "merge_peft_adapter.py", *command("merge_peft_adapter.py", copy))


OTHER_MODELS = {
    "vocabulary": ({"vocab_size": 96}, "weight is 512 x 64, config.json makes it 96 x 64"),
    "width": ({"hidden_size": 32}, ".weight is .* config.json makes it"),
    "MLP": ({"intermediate_size": 96}, "config.json makes it (96 x 64|64 x 96)"),
    "key heads": ({"num_key_value_heads": 1}, "k_proj.weight is .*, config.json makes it"),
    "fewer layers": ({"num_hidden_layers": 1}, "leaves out 9 tensors that the files hold"),
}


@pytest.mark.parametrize(("sizes", "message"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_a_merge_refuses_a_base_whose_configuration_is_another_models(run, copy, sizes, message):
    write_adapter()
    change(copy / "config.json", **sizes)
    fails(run, message, "merge_peft_adapter.py", *command("merge_peft_adapter.py", copy))
    assert not Path("out").exists()


def test_sizes_that_only_a_models_own_code_can_explain_are_told_and_merged(run, copy, caplog):
    write_adapter()
    change(copy / "config.json", intermediate_size=96, auto_map={"AutoConfig": "code.Config"})

    with caplog.at_level("INFO"):
        run("merge_peft_adapter.py", *command("merge_peft_adapter.py", copy))

    assert "config.json are not compared with the weights: it names code of its own" in caplog.text
    assert Path("out/model.safetensors").exists()


FAMILIES = ("gpt2", "gemma2", "mixtral", "qwen2", "gpt_neox", "falcon", "bloom", "opt", "mpt", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "legacy"])
def test_whole_models_of_all_kinds_pass_in_every_format_and_with_bare_names(tmp_path, family, file, caplog):
    from align.models import guard

    folder = save_model(tmp_path / "model", family)
    if file != "model.safetensors":
        from safetensors.torch import load_file

        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        # transformers' own older checkpoints lack the prefix of the model that has the head
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=file != "legacy")

    guard.check_weights(folder, guard.load_config(folder, "--model"), "--model")

    assert ("is not checked" in caplog.text) == (file == "legacy")


# ---------------------------------------------------------------- transformers 5


def write_as_5(folder, changes):
    """The configuration as transformers 5.24 writes it (compared with it, family by family)."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"dtype": config.pop("torch_dtype"), "transformers_version": "5.24.0", **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "out"}))


def rope(theta=70000.0, kind="default", **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}, "rope_theta": "out"}


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.5] * 8, "long_factor": [3.0] * 8}
TWO = {"full_attention": {"rope_theta": 7e5}, "sliding_attention": {"rope_theta": 9e3, "rope_type": "default"}}
WRITTEN_BY_5 = {  # family: its configuration in 4.55, and what 5 writes instead
    "llama": ({"rope_theta": 70000.0}, rope() | {"head_dim": None}),
    "llama, scaled": (
        {"rope_theta": 70000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
        rope(kind="llama3", **LLAMA_3) | {"rope_scaling": "out"},
    ),
    "phi3": (
        {"rope_theta": 70000.0, "rope_scaling": {"type": "longrope", **LONG}, "original_max_position_embeddings": 256},
        rope(kind="longrope", original_max_position_embeddings=256, **LONG)
        | {"rope_scaling": "out", "original_max_position_embeddings": "out"},
    ),
    "phi": ({"rope_theta": 70000.0, "partial_rotary_factor": 0.5}, rope(partial_rotary_factor=0.5)),
    "gpt_neox": (
        {"rotary_emb_base": 70000, "rotary_pct": 0.5},
        rope(partial_rotary_factor=0.5) | dict.fromkeys(("rotary_emb_base", "rotary_pct"), "out"),
    ),
    "gemma3_text": (
        {"rope_theta": 7e5, "rope_local_base_freq": 9e3, "head_dim": 16},
        {"rope_parameters": TWO, "rope_theta": "out", "rope_local_base_freq": "out"},
    ),
    "gpt_oss": (
        {"rope_theta": 70000.0, "rope_scaling": None, "head_dim": 16, "num_local_experts": 4},
        rope() | {"rope_scaling": "out"},
    ),
    "qwen3_moe": (
        {"rope_theta": 70000.0, "num_experts": 4, "moe_intermediate_size": 32},
        rope() | {"num_experts": "out", "num_local_experts": 4},
    ),
}


@pytest.mark.parametrize("family", WRITTEN_BY_5)
def test_a_configuration_of_transformers_5_means_what_it_meant_there(tmp_path, family):
    from align.models import guard

    before, changes = WRITTEN_BY_5[family]
    folder = save_model(tmp_path / "model", family.partition(",")[0], **before)
    expected = guard.load_config(folder, "--model").to_dict()

    write_as_5(folder, changes)
    config = guard.load_config(folder, "--model")

    assert AutoConfig.from_pretrained(folder).to_dict() != expected  # transformers 4.55 alone reads over it
    ours = config.to_dict() | {"transformers_version": expected["transformers_version"]}
    assert {name: ours[name] for name in expected} == expected
    guard.check_weights(folder, config, "--model")


REFUSED = {
    "factor 4, where the lengths make it 8": rope(kind="yarn", factor=4.0, original_max_position_embeddings=64),
    "rope_type: spiral": rope(kind="spiral"),
    "full_attention, sliding_attention": {"rope_parameters": TWO, "rope_theta": "out"},
    "rope_theta is '5000', not a number": rope(theta="5000"),
    "factor of rope_scaling is 0, not above 0": rope(kind="linear", factor=0),
    "partial_rotary_factor: 0.25": rope(partial_rotary_factor=0.25),
    "rope_theta is 10000.0; take one out": {"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 1e4},
    "this is not a causal language model": {"use_bidirectional_attention": True},
    "one set for layers of two types": rope() | {"model_type": "gemma3_text"},
    "a sliding_attention without rope_theta": {
        "rope_parameters": TWO | {"sliding_attention": {"rope_type": "default"}},
        "model_type": "gemma3_text",
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_translated_is_refused(run, copy, message):
    write_as_5(copy, REFUSED[message])
    fails(run, message, "sft.py", *command("sft.py", copy))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not a whole number above 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, not"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings is '512', not"),
    ],
)
def test_a_size_that_no_model_has_is_refused(copy, entries, message):
    change("model/config.json", **entries)

    with pytest.raises(InputError, match=f"--model_name_or_path: model/config.json: {message}"):
        guard.load_config(copy, "--model_name_or_path")


WRONG_KINDS = {
    "rope_theta is '10000', not a number": {"rope_theta": "10000"},
    "rms_norm_eps is '1e-5', not a number": {"rms_norm_eps": "1e-5"},
    "tie_word_embeddings is 'false', not true or false": {"tie_word_embeddings": "false"},
    "hidden_size is 64.5, not a whole number above 0": {"hidden_size": 64.5},
    "num_key_value_heads is 0, not a whole number above 0": {"num_key_value_heads": 0},
    "rope_scaling is of type 'spiral'; transformers 4.55 knows default, dynamic": {"rope_scaling": {"type": "spiral"}},
    "rope_scaling is of type None": {"rope_scaling": {"factor": 2}},
    "rope_scaling is of type 'linear'": {"rope_scaling": "linear"},
    "factor of rope_scaling is '2', not a number": {"rope_scaling": {"type": "linear", "factor": "2"}},
    "pad_token_id is 999, and the tokens of this model are 0 to 511; mend": {"pad_token_id": 999},
    "head_dim is 0, not a whole number above 0": {"head_dim": 0},
    "num_key_value_heads is 2.0, not a whole number above 0": {"num_key_value_heads": 2.0},
    r"max_position_embeddings is \[512\], not a whole number above 0": {"max_position_embeddings": [512]},
    "sliding_window is 0, not a whole number above 0": {"sliding_window": 0},
    "sliding_window is True, not a whole number above 0": {"sliding_window": True},
    "attention_dropout is 2.0, not a number from 0 to 1": {"attention_dropout": 2.0},
    "rope_theta is 0, not a number above 0": {"rope_theta": 0},
    r"rms_norm_eps is \[1\], not a number": {"rms_norm_eps": [1]},
    "torch_dtype is 'auto', not a type of numbers that torch has": {"torch_dtype": "auto"},
    "dtype is 'nn', not a type of numbers that torch has": {"dtype": "nn"},
    "partial_rotary_factor is 0.5, not an entry of llama models": {"partial_rotary_factor": 0.5},
    "text_config is .*, not a part that a llama model has": {"text_config": {"model_type": "llama"}},
    "factor of rope_scaling is 0, not above 0": {"rope_scaling": {"type": "linear", "factor": 0}},
    r"factor of rope_scaling is \[2\], not a number": {"rope_scaling": {"type": "linear", "factor": [2]}},
    "rope_scaling is of type 'su'": {"rope_scaling": {"type": "su", "factor": 2}},
    "short_factor of rope_scaling is .*, not a number": {"rope_scaling": {"type": "longrope", "short_factor": ["1"]}},
    "rope_scaling has original_max_position_embeddings, which transformers 4.55 looks for beside": {
        "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64}
    },
}
WINDOWED = {"model_type": "gemma3_text", "sliding_window": 8}
WRONG_LAYERS = {
    "layer_types names 1 of the 2 layers": WINDOWED | {"layer_types": ["full_attention"]},
    "layer_types has sliding_attention, and there is no sliding_window": WINDOWED | {"sliding_window": None},
    "layer_types has chunked_attention, which gemma3_text models do not have": WINDOWED
    | {"layer_types": ["chunked_attention", "full_attention"]},
}


@pytest.mark.parametrize("message", WRONG_KINDS)
def test_an_entry_of_another_kind_than_its_model_reads_is_refused_by_name(copy, message):
    change("model/config.json", **WRONG_KINDS[message])

    with pytest.raises(InputError, match=f"--model_name_or_path: model/config.json: {message}"):
        guard.load_config(copy, "--model_name_or_path")


def test_null_is_refused_where_a_model_would_stop_at_it_and_no_window_is_one(copy):
    path = copy / "config.json"
    content = json.loads(path.read_text())
    for name in ("max_position_embeddings", "rms_norm_eps", "attention_dropout", "rope_theta", "vocab_size"):
        path.write_text(json.dumps(content | {name: None}))
        with pytest.raises(InputError, match=f"--model: model/config.json: {name} is None, not a number"):
            guard.load_config(copy, "--model")
    path.write_text(json.dumps(content | {"sliding_window": None, "num_key_value_heads": None, "head_dim": None}))
    guard.load_config(copy, "--model")
    save_model(copy, "gpt_neox", classifier_dropout=None)  # which no language model uses
    guard.load_config(copy, "--model")


@pytest.mark.parametrize("message", WRONG_LAYERS)
def test_kinds_of_layers_that_no_class_computes_are_refused(copy, message):
    adapt_transformers()
    content = json.loads((copy / "config.json").read_text()) | WRONG_LAYERS[message]
    (copy / "config.json").write_text(json.dumps(content))

    with pytest.raises(InputError, match=f"--model: model/config.json: {message}"):
        guard.load_config(copy, "--model")


def test_a_configuration_knows_its_own_folder_whatever_it_says(copy):
    adapt_transformers()
    change("model/config.json", _name_or_path="someone/else")
    assert guard.load_config(copy, "--model").name_or_path == "model"


def test_a_configuration_that_makes_no_model_is_one_line_in_training_too(run, copy):
    change(copy / "config.json", pruned_heads={"0": [1]})
    fails(run, "--model_name_or_path: model/config.json makes no model", "sft.py", *command("sft.py", copy))


def test_a_loss_for_experts_that_a_configuration_asks_for_is_told_to_be_left_out(run, tmp_path):
    folder = save_model(tmp_path / "mixtral", "mixtral", output_router_logits=True)
    said = run("sft.py", *command("sft.py", folder)).err
    assert said.count("config.json of") == 1
    assert "sets output_router_logits; the loss of the experts' balance that it asks for is not added here" in said


def test_a_width_of_heads_of_its_own_and_no_quantisation_are_read_as_they_are_written(copy):
    content = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(content | {"head_dim": 32, "quantization_config": None}))
    adapt_transformers()

    config = guard.load_config(copy, "--model")

    assert config.head_dim == 32  # which optimum-habana's configuration of Llama forgets
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_what_is_no_tokens_number_is_refused_in_every_file(copy, file):
    wrong = {"pad_token_id": ("0", [0], 0.5, True, -2), "bos_token_id": ("1", [1], -1)}
    wrong["eos_token_id"] = ("2", ["2"], [2, None], 2.0, -1)
    for name, values in wrong.items():
        for value in values:
            kept = (copy / file).read_text()
            change(copy / file, **{name: value})
            with pytest.raises(InputError, match=rf"--model: model/{file}: {name} is .*, not a token's number"):
                guard.check_folder(copy, "--model")
            (copy / file).write_text(kept)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_what_transformers_stops_at_in_a_generation_config_is_refused_by_name(copy, file):
    wrong = {"num_beams": "2", "max_new_tokens": [100], "temperature": True, "do_sample": "false"}
    for name, value in wrong.items():
        kept = (copy / file).read_text()
        change(copy / file, **{name: value})
        with pytest.raises(InputError, match=rf"--model: model/{file}: {name} is .*, not (a number|true or false)"):
            guard.check_folder(copy, "--model")
        (copy / file).write_text(kept)


def test_padding_that_is_none_or_that_no_embedding_reads_is_told_and_taken_for_none(tmp_path, copy, caplog):
    change(copy / "config.json", pad_token_id=-1)
    unread = tmp_path / "unread"
    unread.mkdir()
    guard._warn_once.cache_clear()

    assert guard.load_config(copy, "--model").pad_token_id is None
    for kind in guard.WITHOUT_PADDING:
        content = {"model_type": kind, "vocab_size": 16, "pad_token_id": 99}
        (unread / "config.json").write_text(json.dumps(content))
        config = guard.load_config(unread, "--model")
        assert config.pad_token_id is None, kind
        config.pad_token_id = 99  # as if it were left there
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert model.get_input_embeddings().padding_idx is None, kind

    told = [record.getMessage() for record in caplog.records if "pad_token_id" in record.getMessage()]
    assert [line.endswith(": it is taken for none") for line in told] == [True] * 2
    assert told[0].startswith(
        "--model: model/config.json: pad_token_id is -1, and the tokens of this model are 0 to 511:"
    )


def test_an_end_that_no_token_of_the_model_is_is_told(run, copy, caplog):
    change(copy / "generation_config.json", eos_token_id=[2, 999], bos_token_id=999)
    guard._warn_once.cache_clear()

    guard.load_config(copy, "--model")

    said = [record.getMessage() for record in caplog.records]
    what = "--model: model/generation_config.json: {} is {}, and the tokens of this model are 0 to 511: no text {} with"
    assert [line.startswith(what.format("bos_token_id", 999, "begins")) for line in said] == [True, False]
    assert said[1].startswith(what.format("eos_token_id", "[2, 999]", "ends"))


@pytest.mark.parametrize(
    ("settings", "content", "message"),
    [
        ({"padding_side": "middle"}, None, "Padding side should be selected between 'right' and 'left'"),
        ({"model_max_length": "x"}, None, "model_max_length is 'x', not a number"),
        ({"model_max_length": [512]}, None, r"model_max_length is \[512\], not a number"),
        ({}, "{", "EOF while parsing"),
        ({}, "", "there is no tokenizer.json"),
    ],
)
def test_a_damaged_tokenizer_is_told_by_its_own_reason(copy, settings, content, message):
    change("model/tokenizer_config.json", **settings)
    if content:
        Path("model/tokenizer.json").write_text(content)
    elif content == "":
        Path("model/tokenizer.json").unlink()

    with pytest.raises(InputError, match=message):
        guard.load_tokenizer(copy, "--tokenizer_name_or_path")


def test_a_tokenizer_that_draws_its_tokens_draws_none_and_that_is_told(copy, caplog):
    right = guard.load_tokenizer(copy, "--model")("What is the capital of France?").input_ids
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.5
    (copy / "tokenizer.json").write_text(json.dumps(content))
    guard._warn_once.cache_clear()

    assert guard.load_tokenizer(copy, "--model")("What is the capital of France?").input_ids == right
    assert "--model: model/tokenizer.json leaves out merges at random (dropout)" in caplog.text


def test_a_chat_template_that_is_damaged_is_one_line(run, copy):
    Path("model/chat_template.jinja").write_text("{% if messages %")

    with pytest.raises(InputError, match="--use_chat_template: prompt 1: the tokenizer's chat template refuses it"):
        run("run_generation.py", "--model_name_or_path", "model", "--use_chat_template", "--prompt", "Hello")


def test_an_entry_that_only_transformers_5_knows_is_told(copy, caplog):
    from align.models import guard

    write_as_5(copy, rope() | {"swiglu_limit": 7.0})
    guard.load_config(copy, "--model")
    assert "4.55 does not use its entries swiglu_limit" in caplog.text


def test_a_folder_of_transformers_5_says_and_tokenises_the_same(run, model, copy):
    path = copy / "tokenizer_config.json"
    write_as_5(copy, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_theta": "out"})
    settings = json.loads(path.read_text())
    more = settings.pop("additional_special_tokens")
    new = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": more}
    del settings["added_tokens_decoder"]
    path.write_text(json.dumps(settings | new))
    (copy / "special_tokens_map.json").unlink()

    answers = [run("run_generation.py", *command("run_generation.py", folder)) for folder in (model, copy)]

    assert answers[0].out == answers[1].out
    assert "not the same type" not in answers[1].err
    from align.models import guard

    first, second = (guard.load_tokenizer(folder, "--model") for folder in (model, copy))
    text = "Hello <|start|>user<|stop|> two and two<|eot|>"
    assert first(text).input_ids == second(text).input_ids
    assert set(first.all_special_tokens) == set(second.all_special_tokens)


# ---------------------------------------------------------------- generation_config.json


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_full_training_of_a_model_with_an_invalid_generation_config_saves(run, copy, file):
    change(copy / file, temperature=0.9, top_p=0.6)

    said = run("sft.py", *command("sft.py", copy, "--use_peft", "False", "--per_device_train_batch_size", 1)).err

    saved = json.loads(Path("out/generation_config.json").read_text())
    assert not {"temperature", "top_p"} & saved.keys()
    assert said.count("sets temperature, top_p without effect") == 1


# ---------------------------------------------------------------- headers


HEADERS = {  # entries of a file with 16 bytes of data: dtype, shape, range
    "whole": {"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [8, 16])},
    "whole, in another order": {"b": ("F32", [2], [8, 16]), "a": ("F32", [2], [0, 8])},
    "whole, with an empty tensor": {"a": ("F32", [2], [0, 8]), "e": ("F32", [0], [8, 8]), "b": ("F32", [2], [8, 16])},
    "an overlap": {"a": ("F32", [3], [0, 12]), "b": ("F32", [2], [8, 16])},
    "the same bytes twice": {"a": ("F32", [4], [0, 16]), "b": ("F32", [4], [0, 16])},
    "a hole": {"a": ("F32", [1], [0, 4]), "b": ("F32", [2], [8, 16])},
    "a hole at the start": {"b": ("F32", [2], [8, 16])},
    "a rest": {"a": ("F32", [2], [0, 8])},
    "beyond the end": {"a": ("F32", [2], [0, 8]), "b": ("F32", [4], [8, 24])},
    "backwards": {"a": ("F32", [2], [8, 0]), "b": ("F32", [2], [8, 16])},
    "a negative size": {"a": ("F32", [-2, -2], [0, 16])},
    "a size that is a fraction": {"a": ("F32", [4.0], [0, 16])},
    "another size than its range": {"a": ("F32", [3], [0, 16])},
    "three ends": {"a": ("F32", [4], [0, 16, 16])},
    "an unknown type": {"a": ("F33", [4], [0, 16])},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_is_refused_where_safetensors_itself_refuses_it(case):
    from safetensors import SafetensorError, safe_open

    from align.merge.checkpoints import read_tensors

    keys = "dtype", "shape", "data_offsets"
    entries = {name: dict(zip(keys, values, strict=True)) for name, values in HEADERS[case].items()}
    header = json.dumps(entries).encode()
    Path("x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))

    try:
        with safe_open("x.safetensors", "pt") as opened:
            names = set(opened.keys())
    except SafetensorError:
        with pytest.raises(InputError, match="x.safetensors"):
            read_tensors(Path("x.safetensors"))
    else:
        assert {tensor.name for tensor in read_tensors(Path("x.safetensors"))} == names
    assert case.startswith("whole") == ("names" in locals())


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub_name(model, tmp_path, monkeypatch):
    """The model as the hub's cache holds it: links from a snapshot to blobs."""
    from huggingface_hub import constants
    from transformers.utils import hub

    folder, commit = tmp_path / "hub" / "models--someone--model", "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder / "snapshots" / commit
    shutil.copytree(model, folder / "blobs")
    snapshot.mkdir(parents=True)
    for path in (folder / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path / "hub"))
    return "someone/model", folder / "blobs"


@pytest.mark.parametrize("script", ["sft.py", "run_generation.py"])
def test_a_model_of_the_hub_is_checked_in_its_cache_and_runs(run, hub_name, marker, script):
    name, blobs = hub_name
    run(script, *command(script, name))
    if script == "sft.py":
        adapter = json.loads(Path("out/adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == name

    change_weights(blobs, lambda tensors: tensors[UP][5].fill_(torch.nan))
    again = ["--overwrite_output_dir"] if script == "sft.py" else []
    fails(run, f"{UP} holds NaN", script, *command(script, name, *again))
    write_lightglue(blobs)
    fails(run, "sets trust_remote_code", script, *command(script, name, *again))
    assert not marker.exists()


def test_attention_of_other_devices_gives_way_and_is_told(run, copy):
    plain = run("run_generation.py", *command("run_generation.py", copy))
    change(copy / "config.json", _attn_implementation="flash_attention_2")

    said = run("run_generation.py", *command("run_generation.py", copy))

    assert said.out == plain.out
