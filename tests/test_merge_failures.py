"""python -m pytest tests/test_merge_failures.py

Wrong input costs one clear line; a failure or a kill at any moment leaves the old output or the complete new one.
"""

import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import merge_peft_adapter
from align.errors import InputError
from align.merge.checkpoints import open_checkpoint
from align.merge.plan import open_adapter, plan_merge
from align.merge.writing import verify_files
from align.whole import replace_folder

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "vocab_size": 32}
ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4}
Q_PROJ = "model.layers.0.self_attn.q_proj"
COMMAND = ["--adapter_model_name", "adapter", "--output_name", "merged"]


def write_json(path, content):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps(content))


def change_json(path, **changes):
    write_json(path, {**json.loads(Path(path).read_text()), **changes})


def change_tensors(path, **changes):
    """`a__b=tensor` sets the tensor a.b, or drops it where the value is None."""
    tensors = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def save_shards(folder, rows=8, layers=1, seed=0):
    """A Llama-named base in two shards, of bf16 weights [rows, 8], and an adapter for its q_proj."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"model.layers.{layer}.self_attn.{name}.weight": torch.randn(rows, 8, generator=generator).bfloat16()
        for layer in range(layers)
        for name in ("q_proj", "v_proj")
    }
    embeddings = {name: torch.randn(32, 8).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_json(folder / "base/config.json", CONFIG)
    places = {}
    for file, tensors in (("model-00001.safetensors", weights), ("model-00002.safetensors", embeddings)):
        save_file(tensors, folder / "base" / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
    write_json(folder / "base/model.safetensors.index.json", {"weight_map": places})
    adapter = {}
    for layer in range(layers):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        adapter[f"{module}.lora_A.weight"] = torch.randn(2, 8, generator=generator)
        adapter[f"{module}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    write_json(folder / "adapter/adapter_config.json", ADAPTER)
    save_file(adapter, folder / "adapter/adapter_model.safetensors")


@pytest.fixture
def inputs(tmp_path):
    save_shards(tmp_path)
    return tmp_path


LORA = "base_model__model__" + Q_PROJ.replace(".", "__")
ADAPTER_WEIGHTS, FIRST_SHARD = "adapter/adapter_model.safetensors", "base/model-00001.safetensors"


def truncate(path):
    os.truncate(path, Path(path).stat().st_size - 7)


def overwrite_header(path):
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"garbage")


def rename_adapter(old, new):
    tensors = load_file(ADAPTER_WEIGHTS)
    save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, ADAPTER_WEIGHTS)


BAD_INPUTS = {
    "no adapter": (lambda: shutil.rmtree("adapter"), "--adapter_model_name: adapter is not a folder, and"),
    "adapter is a model": (lambda: os.remove("adapter/adapter_config.json"), "adapter has no adapter_config.json"),
    "adapter without weights": (lambda: os.remove(ADAPTER_WEIGHTS), f"{ADAPTER_WEIGHTS} is missing"),
    "adapter names no base": (
        lambda: change_json("adapter/adapter_config.json", base_model_name_or_path=None),
        "--base_model_name: missing, and adapter/adapter_config.json names no base",
    ),
    "adapter names a base that is not here": (
        lambda: change_json("adapter/adapter_config.json", base_model_name_or_path="../elsewhere/base"),
        "--base_model_name: not given; that of adapter/adapter_config.json: ../elsewhere/base is not a folder, and",
    ),
    "half a JSON": (lambda: Path("base/config.json").write_text('{"a'), "base/config.json is not valid JSON"),
    "record of merges is damaged": (
        lambda: write_json(
            "base/merge_info.json", {"merges": [dict.fromkeys(("base_model", "adapter", "adapter_sha256"))]}
        ),
        "base/merge_info.json is damaged: it lists what is merged in already",
    ),
    "no config": (lambda: os.remove("base/config.json"), "base/config.json cannot be read: No such file"),
    "base is empty": (
        lambda: [os.remove("base/model.safetensors.index.json"), os.remove(FIRST_SHARD)],
        "base has no model.safetensors or pytorch_model.bin",
    ),
    "shard is missing": (lambda: os.remove(FIRST_SHARD), "names model-00001.safetensors, which is not there"),
    "shard is truncated": (lambda: truncate(FIRST_SHARD), f"{FIRST_SHARD} is truncated or damaged"),
    "shard has no header": (lambda: overwrite_header(FIRST_SHARD), f"{FIRST_SHARD} is damaged"),
    "shard is empty": (lambda: Path(FIRST_SHARD).write_bytes(b""), f"{FIRST_SHARD} is damaged"),
    "shard lacks a tensor": (
        lambda: change_tensors(FIRST_SHARD, **{Q_PROJ.replace(".", "__") + "__weight": None}),
        f"looks for {Q_PROJ}.weight in model-00001.safetensors, which does not hold it",
    ),
    "a tensor in two shards": (
        lambda: change_tensors(FIRST_SHARD, lm_head__weight=torch.zeros(32, 8).bfloat16()),
        f"{FIRST_SHARD} holds lm_head.weight as well, with other values than model-00002.safetensors",
    ),
    "torch file that holds no tensors by name": (
        lambda: [os.remove("base/model.safetensors.index.json"), torch.save([1], "base/pytorch_model.bin")],
        "base/pytorch_model.bin holds a list where tensors by name are expected",
    ),
    "base of no type": (
        lambda: change_json("base/config.json", model_type=None),
        "--base_model_name: base/config.json has no model_type",
    ),
    "base of bytes": (
        lambda: change_tensors("base/model-00002.safetensors", lm_head__weight=torch.ones(32, 8).to(torch.float8_e5m2)),
        "base/model-00002.safetensors: lm_head.weight is F8_E5M2: give the unquantised model",
    ),
    "quantised base": (
        lambda: change_json("base/config.json", quantization_config={"quant_method": "gptq"}),
        "base is quantised (gptq)",
    ),
    "configuration of another adapter": (
        lambda: change_json("adapter/adapter_config.json", target_modules=["v_proj", "proj"]),
        f"changes {Q_PROJ}, which target_modules of its adapter_config.json do not name",
    ),
    "adapter is truncated": (lambda: truncate(ADAPTER_WEIGHTS), f"{ADAPTER_WEIGHTS} is truncated"),
    "adapter of another architecture": (
        lambda: change_tensors(ADAPTER_WEIGHTS, base_model__model__transformer__h__0__lora_A__weight=torch.ones(2, 8)),
        "transformer.h.0 has no lora_B.weight",
    ),
    "adapter tensor without a place": (
        lambda: change_tensors(
            ADAPTER_WEIGHTS,
            base_model__model__h__lora_A__weight=torch.ones(2, 8),
            base_model__model__h__lora_B__weight=torch.ones(8, 2),
        ),
        "base_model.model.h.lora_A.weight finds no place in base (llama)",
    ),
    "adapter of another size": (
        lambda: change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_B__weight": torch.ones(16, 2)}),
        "lora_B.weight [16, 2] does not fit model.layers.0.self_attn.q_proj.weight [8, 8]",
    ),
    "adapter of another rank": (
        lambda: change_json("adapter/adapter_config.json", r=4),
        "lora_A.weight has rank 2, adapter_config.json says 4",
    ),
    "adapter of ZeRO-3 not gathered": (
        lambda: change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_B__weight": torch.ones(0)}),
        "lora_B.weight is empty, as ZeRO-3 leaves",
    ),
    "adapter that diverged": (
        lambda: change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_B__weight": torch.full((8, 2), torch.nan)}),
        f"{Q_PROJ}.weight would hold NaN or infinity",
    ),
    "adapter that is not PEFT's": (
        lambda: write_json("adapter/adapter_config.json", {"base_model_name_or_path": "base"}),
        "adapter/adapter_config.json has no peft_type",
    ),
    "replicated layers": (
        lambda: change_json("adapter/adapter_config.json", layer_replication=[[0, 1]]),
        "layer_replication",
    ),
    "adapter of a newer PEFT": (
        lambda: change_json("adapter/adapter_config.json", alora_invocation_tokens=[1, 2]),
        "adapter/adapter_config.json: alora_invocation_tokens is set, which PEFT 0.17 does not know",
    ),
    "adapter of a part that the base lacks": (
        lambda: rename_adapter("base_model.model.", "base_model.model.vision_tower."),
        "vision_tower.model.layers.0.self_attn.q_proj.lora_A.weight finds no place in base (llama)",
    ),
    "adapter of a model that sees pictures": (
        lambda: rename_adapter("base_model.model.", "base_model.model.language_model."),
        "language_model.model.layers.0.self_attn.q_proj.lora_A.weight finds no place in base (llama)",
    ),
    "adapter is empty": (lambda: save_file({}, ADAPTER_WEIGHTS), f"{ADAPTER_WEIGHTS}: holds no tensor"),
    "base with NaN in a tensor that is copied": (
        lambda: change_tensors(
            "base/model-00002.safetensors", lm_head__weight=torch.full((32, 8), torch.nan).bfloat16()
        ),
        "lm_head.weight would hold NaN or infinity: did the run that wrote base/model-00002.safetensors diverge",
    ),
    "adapter of whole numbers": (
        lambda: change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_A__weight": torch.ones(2, 8, dtype=torch.int32)}),
        "lora_A.weight is I32, not one of F64, F32, F16, BF16",
    ),
    "adapter of vectors": (
        lambda: change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_B__weight": torch.ones(8)}),
        "lora_B.weight [8] is no matrix",
    ),
    "adapter of DoRA whose configuration is of LoRA": (
        lambda: change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_magnitude_vector": torch.ones(8)}),
        "lora_magnitude_vector is not what its adapter_config.json says (use_dora, lora_bias)",
    ),
    "adapter that is two kinds of update": (
        lambda: change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_embedding_" + end: torch.ones(2, 8) for end in "AB"}),
        "lora_A.weight is not what its adapter_config.json says",
    ),
    "adapter without the biases that it says it has": (
        lambda: change_json("adapter/adapter_config.json", lora_bias=True),
        f"{Q_PROJ} has no lora_B.bias",
    ),
    "a tensor of the adapter under two names": (
        lambda: change_tensors(
            ADAPTER_WEIGHTS, **{f"base_model__model___orig_mod__{Q_PROJ}__lora_A__weight": torch.ones(2, 8)}
        ),
        f"{Q_PROJ}.lora_A.weight are for one place",
    ),
    "tokenizer is damaged": (
        lambda: [
            write_json("adapter/tokenizer.json", {}),
            write_json("adapter/tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}),
        ],
        "adapter/tokenizer_config.json: added_tokens_decoder is not tokens by number",
    ),
    "output is a link to itself": (lambda: os.symlink("merged", "merged"), "is a link that leads back to itself"),
    "place of the unfinished model is a link": (
        lambda: [Path("photos").mkdir(), Path(".merged.partial").symlink_to("photos")],
        ".merged.partial, where the model would be written first, is a link to elsewhere",
    ),
    "output is a file": (lambda: Path("merged").write_text(""), "merged is a file; name a folder"),
    "output exists": (lambda: write_json("merged/config.json", {}), "merged exists; add --overwrite"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_wrong_input_is_one_clear_line_and_writes_nothing(case, inputs):
    spoil, message = BAD_INPUTS[case]
    spoil()
    before = sorted(inputs.rglob("*"))

    with pytest.raises(InputError) as error:
        merge_peft_adapter.main(COMMAND)

    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(inputs.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "merged"], "--output"),
        (["--dtype", "int8"], "--dtype"),
        (["--verify", "maybe"], "give True or False"),
        (["--num_workers", "0"], "--num_workers: got 0"),
        (["--output_name", "base"], "base is or holds --base_model_name base"),
        (["--output_name", "adapter"], "adapter is or holds --adapter_model_name adapter"),
        (["--output_name", ""], "--output_name: is empty"),
        (["--output_name", "/"], "--output_name: / cannot be written"),
        (["--output_name", "m" * 250], "cannot be written (File name too long); name another folder"),
        (["--output_name", ".", "--overwrite"], " is or holds --base_model_name"),
        (["--output_name", "photos", "--overwrite"], "photos holds no model, so it stays"),
        (["--output_name", "base/config.json/merged"], "base/config.json/merged (Not a directory)"),
        (["--base_model_name", "base/config.json"], "--base_model_name: base/config.json is a file"),
        (["--push_to_hub", "me/model"], "--push_to_hub: me/model"),
        (["--push_to_hub", "me/my/model"], "--push_to_hub: me/my/model: Repo id must be"),
    ],
)
def test_wrong_flag_is_one_clear_line(arguments, message, inputs):
    write_json("photos/holiday.json", {})

    with pytest.raises(InputError) as error:
        merge_peft_adapter.main([*COMMAND, *arguments])

    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert Path("photos/holiday.json").exists()


NONSENSE = {
    "r": ["2", None, 0, [2], 1.5, True],
    "lora_alpha": [None, "", "16", [16], {"q_proj": 2}, True, 0, float("nan"), float("inf")],
    "rank_pattern": [1.5, "q_proj", ["q_proj"], {"(": 4}, {"q_proj": "x"}, {"q_proj": None}],
    "alpha_pattern": [True, [1], {"q_proj": float("inf")}, {"q_proj": 0}],
    "fan_in_fan_out": ["no", 1.5, []],
    "use_rslora": ["false", 2],
    "use_dora": [{"x": 1}],
    "bias": [True, "some"],
    "target_modules": ["((", 5, [1]],
    "target_parameters": [5, "w1.weight"],
    "init_lora_weights": [5, ["pissa"]],
    "modules_to_save": ["lm_head", [1]],
    "task_type": [7, ["CAUSAL_LM"]],
    "trainable_token_indices": ["all", 3, [1.5], {"embed_tokens": "1"}],
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_value_in_the_adapters_config_that_is_none_is_one_line_that_names_it(name, inputs):
    for value in NONSENSE[name]:
        write_json("adapter/adapter_config.json", {**ADAPTER, name: value})
        with pytest.raises(InputError, match=f"adapter_config.json: {name} is .*, not ") as error:
            merge_peft_adapter.main(COMMAND)
        assert "\n" not in str(error.value)
    assert not list(inputs.glob("*merged*"))


def test_command_line_ends_with_exit_code_2_and_one_line(inputs):
    command = [sys.executable, ROOT / "merge_peft_adapter.py", "--adapter_model_name=nowhere", "--output_name=merged"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("merge_peft_adapter.py: error: --adapter_model_name: nowhere is not a folder")
    assert done.stderr.count("\n") == 1


def test_verify_false_writes_values_that_are_not_finite(inputs):
    change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_B__weight": torch.full((8, 2), torch.inf)})

    merge_peft_adapter.main([*COMMAND, "--verify", "False"])

    assert not load_file("merged/model-00001.safetensors")[f"{Q_PROJ}.weight"].isfinite().all()


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite"])
def test_verify_finds_what_a_disk_did_not_keep(call, inputs, monkeypatch):
    def write_zeros(*arguments):
        if call == "pwrite":
            out, memory, offset = arguments
            return write(out, bytes(len(memory)), offset)
        _, out, size, _, offset = arguments
        return write(out, bytes(size), offset)

    write = os.pwrite
    monkeypatch.setattr(os, call, write_zeros)

    with pytest.raises(OSError, match="reads back other than it was written"):
        merge_peft_adapter.main(COMMAND)


def test_verify_finds_a_tensor_in_another_file_than_was_planned(inputs):
    merge_peft_adapter.main(COMMAND)
    base, adapter = open_checkpoint(Path("base")), open_adapter(Path("adapter"), ADAPTER)
    plan = plan_merge(base, CONFIG, adapter, None)
    verify_files(plan, open_checkpoint(Path("merged")))
    for name, other in (("model-00001", "model-00002"), ("model-00002", "model-00001")):
        os.rename(f"merged/{name}.safetensors", f"merged/{other}.new")
    for path in Path("merged").glob("*.new"):
        path.rename(path.with_suffix(".safetensors"))
    index = Path("merged/model.safetensors.index.json")
    places = json.loads(index.read_text())["weight_map"]
    swapped = {
        "model-00001.safetensors": "model-00002.safetensors",
        "model-00002.safetensors": "model-00001.safetensors",
    }
    write_json(index, {"weight_map": {name: swapped[file] for name, file in places.items()}})

    with pytest.raises(OSError, match="was not written as planned"):
        verify_files(plan, open_checkpoint(Path("merged")))


def test_verify_finds_the_same_bytes_under_another_type(inputs):
    merge_peft_adapter.main(COMMAND)
    plan = plan_merge(open_checkpoint(Path("base")), CONFIG, open_adapter(Path("adapter"), ADAPTER), None)
    name = "merged/model-00001.safetensors"
    save_file({key: tensor.view(torch.float16) for key, tensor in load_file(name).items()}, name)

    with pytest.raises(OSError, match="was not written as planned"):
        verify_files(plan, open_checkpoint(Path("merged")))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "module.base_model.model."),
        ("base_model.model.", "_orig_mod.module.base_model.model."),
        ("layers.0.", "layers.0._fsdp_wrapped_module."),
    ],
)
def test_wrappers_of_a_training_loop_are_no_part_of_a_name(before, after, inputs):
    merge_peft_adapter.main(COMMAND)
    rename_adapter(before, after)

    merge_peft_adapter.main([*COMMAND, "--output_name", "again"])

    for file in ("model-00001.safetensors", "model-00002.safetensors"):
        assert Path("again", file).read_bytes() == Path("merged", file).read_bytes()


@pytest.mark.parametrize(("flags", "targets"), [([], ["q_proj", "v_proj"]), (["--dtype", "float32"], r".*\.[qv]_proj")])
def test_an_adapter_that_changes_nothing_or_half_of_its_modules_is_told(flags, targets, inputs, caplog):
    change_json("adapter/adapter_config.json", target_modules=targets)
    change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_B__weight": torch.zeros(8, 2)})

    merge_peft_adapter.main([*COMMAND, *flags])

    assert "every update of adapter/adapter_model.safetensors is zero" in caplog.text
    assert "changes 1 modules and not 1 others" in caplog.text
    assert "model.layers.0.self_attn.v_proj" in caplog.text


def test_what_an_adapter_names_and_does_not_hold_is_told(inputs, caplog):
    change_json("adapter/adapter_config.json", modules_to_save=["lm_head"], trainable_token_indices=[1])

    merge_peft_adapter.main(COMMAND)

    assert "lacks lm_head, rows of tokens (trainable_token_indices), which its adapter_config.json names" in caplog.text


def test_updates_that_are_zero_are_counted(tmp_path, caplog):
    save_shards(tmp_path, layers=2)
    change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_A__weight": torch.zeros(2, 8)})

    merge_peft_adapter.main(COMMAND)

    assert f"1 of 2 updates of adapter/adapter_model.safetensors are zero, such as that of {Q_PROJ}" in caplog.text


def test_updates_that_the_bases_numbers_cannot_hold_are_counted(tmp_path, caplog):
    save_shards(tmp_path, layers=2)
    change_tensors(ADAPTER_WEIGHTS, **{LORA + "__lora_A__weight": torch.full((2, 8), 1e-9)})

    merge_peft_adapter.main(COMMAND)

    lost = f"1 of 2 updates of adapter/adapter_model.safetensors change no number in bfloat16, such as that of {Q_PROJ}"
    assert f"{lost}.weight; --dtype float32 keeps small ones" in caplog.text
    caplog.clear()
    merge_peft_adapter.main([*COMMAND, "--overwrite", "--dtype", "float32"])
    assert "change no number" not in caplog.text


def test_a_tied_base_that_stores_its_head_gets_the_trained_tokens_in_both(inputs):
    change_json("base/config.json", tie_word_embeddings=True)
    embedding = load_file("base/model-00002.safetensors")["model.embed_tokens.weight"]
    change_tensors("base/model-00002.safetensors", lm_head__weight=embedding.clone())
    change_json("adapter/adapter_config.json", trainable_token_indices={"embed_tokens": [3]})
    rows = {"base_model__model__model__embed_tokens__token_adapter__trainable_tokens_delta": torch.ones(1, 8)}
    change_tensors(ADAPTER_WEIGHTS, **rows)

    merge_peft_adapter.main(COMMAND)

    merged = load_file("merged/model-00002.safetensors")
    assert merged["model.embed_tokens.weight"][3].eq(1).all()
    assert merged["lm_head.weight"].equal(merged["model.embed_tokens.weight"])


def test_a_tied_head_that_was_trained_to_other_values_than_the_embedding_is_untied(inputs):
    change_json("base/config.json", tie_word_embeddings=True)
    change_tensors("base/model-00002.safetensors", lm_head__weight=None)
    index = json.loads(Path("base/model.safetensors.index.json").read_text())["weight_map"]
    write_json(
        "base/model.safetensors.index.json", {"weight_map": {k: v for k, v in index.items() if k != "lm_head.weight"}}
    )
    change_json("adapter/adapter_config.json", modules_to_save=["embed_tokens", "lm_head"])
    values = {"base_model__model__model__embed_tokens__weight": torch.ones(32, 8)}
    values["base_model__model__lm_head__weight"] = torch.full((32, 8), 2.0)
    change_tensors(ADAPTER_WEIGHTS, **values)

    merge_peft_adapter.main(COMMAND)

    merged = load_file("merged/model-00002.safetensors")
    assert merged["model.embed_tokens.weight"].eq(1).all()
    assert merged["lm_head.weight"].eq(2).all()
    assert json.loads(Path("merged/config.json").read_text())["tie_word_embeddings"] is False


def test_a_pattern_of_ranks_is_for_whole_names_alone(inputs):
    change_json("adapter/adapter_config.json", r=2, rank_pattern={"q": 4}, alpha_pattern={"layers.0.self_attn.q": 99})
    merge_peft_adapter.main(COMMAND)
    change_json("adapter/adapter_config.json", rank_pattern={}, alpha_pattern={})

    merge_peft_adapter.main([*COMMAND, "--output_name", "again"])

    file = "model-00001.safetensors"
    assert Path("again", file).read_bytes() == Path("merged", file).read_bytes()


def test_a_home_folder_is_the_users_and_an_empty_quantization_is_none(inputs, monkeypatch):
    """`--output_name=~/merged` is no path that a shell expands; transformers stops at a quantization of {}."""
    monkeypatch.setenv("HOME", str(inputs / "home"))
    change_json("base/config.json", quantization_config={})

    merge_peft_adapter.main([*COMMAND, "--output_name=~/merged"])

    assert json.loads((inputs / "home/merged/config.json").read_text()) == CONFIG
    assert not list(inputs.glob("~"))


def test_a_link_is_written_through_and_stays(inputs):
    Path("disk").mkdir()
    Path("merged").symlink_to("disk/model")

    merge_peft_adapter.main(COMMAND)
    merge_peft_adapter.main([*COMMAND, "--overwrite"])

    assert Path("merged").is_symlink()
    assert Path("disk/model/config.json").is_file()


def test_a_tokenizer_without_its_vocabulary_is_taken_from_the_base(inputs, caplog):
    for folder, content in (("base", "base"), ("adapter", "adapter")):
        write_json(f"{folder}/tokenizer_config.json", {"chat_template": content})
    write_json("base/tokenizer.json", {})
    write_json("base/additional_chat_templates/tool.jinja", "tools")
    write_json("base/tekken.json", {})
    write_json("base/params.json", {})
    write_json("base/video_preprocessor_config.json", {})
    change_json("base/config.json", dtype="bfloat16", torch_dtype="bfloat16")

    merge_peft_adapter.main(COMMAND)

    assert json.loads(Path("merged/tokenizer_config.json").read_text()) == {"chat_template": "base"}
    names = {"tokenizer.json", "tekken.json", "params.json", "video_preprocessor_config.json"}
    assert names <= {path.name for path in Path("merged").iterdir()}
    assert Path("merged/additional_chat_templates/tool.jinja").exists()
    assert "has no vocabulary" in caplog.text
    assert len({"dtype", "torch_dtype"} & json.loads(Path("merged/config.json").read_text()).keys()) == 1


def test_overwrite_replaces_the_whole_folder(inputs):
    write_json("merged/config.json", {})
    write_json("merged/stale.json", {})

    merge_peft_adapter.main([*COMMAND, "--overwrite"])

    assert not Path("merged/stale.json").exists()
    assert json.loads(Path("merged/config.json").read_text()) == CONFIG


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_file_systems_that_cannot_swap_folders_get_two_renames(number, inputs, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("align.whole.swap_folders", refuse)
    write_json("merged/config.json", {})

    merge_peft_adapter.main([*COMMAND, "--overwrite"])

    assert json.loads(Path("merged/config.json").read_text()) == CONFIG
    assert sorted(path.name for path in inputs.iterdir()) == ["adapter", "base", "merged"]


def test_what_a_kill_between_two_renames_left_is_restored_or_cleared(inputs):
    write_json(".merged.previous/config.json", {"the": "old model"})
    write_json(".merged.partial/model-00001.safetensors", "half a shard")

    with pytest.raises(InputError, match="exists; add --overwrite"):
        merge_peft_adapter.main(COMMAND)
    old = json.loads(Path("merged/config.json").read_text())
    merge_peft_adapter.main([*COMMAND, "--overwrite"])

    assert old == {"the": "old model"}
    assert json.loads(Path("merged/config.json").read_text()) == CONFIG
    assert sorted(path.name for path in inputs.iterdir()) == ["adapter", "base", "merged"]


def test_disks_between_which_the_kernel_cannot_copy_are_copied_through_memory(inputs, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)

    merge_peft_adapter.main(COMMAND)

    base, merged = load_file("base/model-00002.safetensors"), load_file("merged/model-00002.safetensors")
    assert all(torch.equal(base[name], merged[name]) for name in base)


def test_second_merge_into_the_same_folder_is_refused_while_the_first_writes(inputs):
    write_json("merged/config.json", {"the": "old model"})

    with replace_folder(Path("merged"), "--output_name") as folder:
        (folder / "config.json").write_text('{"the": "first one\'s"}')
        with pytest.raises(InputError, match="another run is writing .*merged right now"):
            merge_peft_adapter.main([*COMMAND, "--overwrite"])

    assert "first one's" in Path("merged/config.json").read_text()


def test_too_small_a_disk_is_told_before_anything_is_written(inputs, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))

    with pytest.raises(InputError, match=r"0\.0 GB free, the merged model needs"):
        merge_peft_adapter.main(COMMAND)

    assert not Path("merged").exists()


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_disk_that_fills_up_during_the_merge_leaves_nothing(small_disk, tmp_path, monkeypatch):
    save_shards(tmp_path, rows=100_000)
    monkeypatch.setattr(merge_peft_adapter, "check_disk", lambda *_: None)  # as if someone else took the space

    with pytest.raises(InputError, match=r"merged cannot be written \(No space left on device\); nothing"):
        merge_peft_adapter.main(["--adapter_model_name", "adapter", "--output_name", str(small_disk / "merged")])

    assert list(small_disk.iterdir()) == []


def test_folder_without_write_permission_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_shards(folder)
        (folder / "closed").mkdir(mode=0o555)
        for path in (folder, *folder.glob("*/*.safetensors")):
            path.chmod(0o755)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may write anywhere

        try:
            with pytest.raises(InputError, match=r"cannot write beside .*closed/merged \(Permission denied\)"):
                merge_peft_adapter.main(
                    ["--adapter_model_name", f"{folder}/adapter", "--base_model_name", f"{folder}/base"]
                    + ["--output_name", f"{folder}/closed/merged"]
                )
        finally:
            os.seteuid(user)


# ---- kills


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base of 420 MB, whose merge takes long enough to be hit."""
    folder = tmp_path_factory.mktemp("large")
    save_shards(folder, rows=650_000, layers=20)
    command = [sys.executable, ROOT / "merge_peft_adapter.py", *COMMAND, "--overwrite"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return folder, command, done.stderr


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def assert_kills_leave_a_whole_model(large, kills, seed):
    """Half of the kills fall anywhere in the run, half while the partial folder exists, where they could do harm."""
    folder, command, _ = large
    output, partial = folder / "merged", folder / ".merged.partial"
    whole = digest(output)
    (output / "config.json").write_text(json.dumps({**CONFIG, "old": True}))
    old = digest(output)
    chance = random.Random(seed)
    hits = 0
    for number in range(kills):
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if number % 2:
            deadline = time.monotonic() + 60
            while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
        time.sleep(chance.uniform(0, 3))
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
        found = digest(output)
        assert found in (old, whole)
        old = found
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    assert digest(output) == whole
    assert not partial.exists()
    assert hits


def test_kills_at_random_moments_leave_the_old_output_or_the_new_one(large):
    assert_kills_leave_a_whole_model(large, kills=4, seed=0)


@pytest.mark.soak
def test_fifty_kills_at_random_moments_leave_the_old_output_or_the_new_one(large):
    assert_kills_leave_a_whole_model(large, kills=50, seed=1)


def test_termination_clears_the_partial_folder(large):
    folder, command, _ = large
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    while not list((folder / ".merged.partial").glob("*")):
        assert process.poll() is None
        time.sleep(0.002)

    process.terminate()

    assert process.wait() == 143
    assert not (folder / ".merged.partial").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("call", ["os.mkdir", "fcntl.flock", "os.rename", "shutil.rmtree"])
def test_a_signal_at_any_call_leaves_the_old_output_or_the_new_one_and_nothing_else(inputs, number, call):
    """The handlers are those of main(); an audit hook sends the signal from within that call."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    SIGNAL_AT.update(call=call, number=number, place=".merged.partial")
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
            merge_peft_adapter.main(COMMAND)
    finally:
        SIGNAL_AT.clear()
        for each, handler in before.items():
            signal.signal(each, handler)

    assert not list(inputs.glob(".merged*"))
    assert not (inputs / "merged").exists() or open_checkpoint(inputs / "merged").tensors
    assert ended.type is KeyboardInterrupt or ended.value.code == 128 + number


SIGNAL_AT = {}


def send_signal_at(event, arguments):
    """What is about to be done, by name and place: a lock has no place."""
    if SIGNAL_AT.get("call") == event and (event == "fcntl.flock" or SIGNAL_AT["place"] in str(arguments[0])):
        number = SIGNAL_AT["number"]
        SIGNAL_AT.clear()
        signal.raise_signal(number)


sys.addaudithook(send_signal_at)


def test_peak_memory_stays_below_400_mb_and_is_told(large):
    _, _, output = large

    peak = int(re.search(r"peak memory (\d+) MB", output)[1])

    assert peak < (400 if torch.version.cuda is None else 700)  # a CUDA build's libraries take 300 MB of their own
