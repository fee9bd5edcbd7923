"""python -m pytest tests/test_merge.py

Merged models equal PEFT's own merge to the last bit, and are complete for whoever loads them.
"""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_config, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

import align.merge.arithmetic
import merge_peft_adapter
from align.errors import InputError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
IDS = torch.arange(3, 40).view(1, -1)

pytestmark = pytest.mark.filterwarnings("ignore")


def save_base(folder, family="llama", dtype=torch.bfloat16, saving=(), **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(family, **changes), torch_dtype=dtype)
    model.save_pretrained(folder, **dict(saving))
    make_tokenizer().save_pretrained(folder)


def load_base(folder, dtype=torch.bfloat16, resize=None, untie=False, classes=None):
    torch.manual_seed(1)
    if classes:
        return AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=dtype, num_labels=classes)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype)
    if untie:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    if resize:
        model.resize_token_embeddings(resize)
    return model


def save_adapter(folder, model, **settings):
    """A LoRA adapter whose every trained value is random and lies where training may have left it."""
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data = parameter.data + 0.05 * noise
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def merge(*arguments, base="base", adapter="adapter", output="merged"):
    command = [f"--base_model_name={base}", f"--adapter_model_name={adapter}", f"--output_name={output}", *arguments]
    merge_peft_adapter.main(command)
    return {name: tensor for file in Path(output).glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(merged, reference):
    """`reference` is a state dict, in which tied tensors appear twice and in the file once."""
    assert set(merged) <= set(reference)
    held = {reference[name].data_ptr() for name in merged}
    assert {name for name, tensor in reference.items() if tensor.data_ptr() not in held} == set()
    for name, expected in reference.items():
        if name in merged:
            assert merged[name].dtype == expected.dtype
            assert torch.equal(merged[name], expected), name


def test_a_merge_that_lacks_a_tensor_is_not_the_reference():
    tied = torch.ones(2)
    with pytest.raises(AssertionError):
        assert_same_bits({}, {"embedding": tied})
    assert_same_bits({"embedding": tied}, {"embedding": tied, "head": tied})


VARIANTS = {
    "llama, attention": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "llama, all linear": ("llama", {"target_modules": LINEAR}),
    "qwen2, all linear": ("qwen2", {"target_modules": LINEAR}),
    "mixtral, experts": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}),
    "gpt2, Conv1D": ("gpt2", {"target_modules": CONV1D}),
    "rank and alpha patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8},
            "alpha_pattern": {"v_proj": 3, "model.layers.0.mlp.down_proj": 9},
        },
    ),
    "rsLoRA": ("qwen2", {"target_modules": LINEAR, "use_rslora": True}),
    "DoRA": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "DoRA, Conv1D": ("gpt2", {"target_modules": CONV1D, "use_dora": True}),
    "DoRA, embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "DoRA, experts": ("mixtral", {"target_modules": ["w1", "w2"], "use_dora": True}),
    "trained biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "trained biases, Conv1D": ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "lora_bias on trained biases": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all"}),
    "embedding and head": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "trainable tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5, 400]}),
    "trainable tokens, tied": (
        "qwen2",
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7]}, "tie_word_embeddings": True},
    ),
    "resized": ("llama", {"target_modules": ["q_proj"], "resize": 520}),
    "resized and trained": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "resize": 520}),
    "resized, tied": ("gpt2", {"target_modules": ["c_attn"], "resize": 520}),
    "head, untied": ("gpt2", {"target_modules": ["c_proj", "lm_head"], "untie": True}),
    "embedding, untied": ("gpt2", {"target_modules": ["c_attn", "wte"], "untie": True}),
    "saved head, untied": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "tie_word_embeddings": True, "untie": True},
    ),
    "classifier, llama": ("llama", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS", "classes": 3}),
    "classifier, gpt2": ("gpt2", {"target_modules": ["c_attn"], "task_type": "SEQ_CLS", "classes": 1}),
    "classifier, mixtral": ("mixtral", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS", "classes": 2}),
    "fp32": ("llama", {"target_modules": [*LINEAR, "embed_tokens"], "dtype": torch.float32}),
    "fp16": ("llama", {"target_modules": [*LINEAR, "embed_tokens"], "dtype": torch.float16}),
    "sharded": ("llama", {"target_modules": LINEAR, "saving": {"max_shard_size": "100KB"}}),
    ".bin": ("llama", {"target_modules": LINEAR, "saving": {"safe_serialization": False}}),
    ".bin, sharded, tied": (
        "gpt2",
        {"target_modules": CONV1D, "saving": {"safe_serialization": False, "max_shard_size": "200KB"}},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merge_equals_that_of_peft_to_the_last_bit(variant):
    family, settings = VARIANTS[variant]
    settings = dict(settings)
    loading = {key: settings.pop(key) for key in ("dtype", "resize", "untie", "classes") if key in settings}
    tied = {key: settings.pop(key) for key in ("tie_word_embeddings",) if key in settings}
    save_base("base", family, loading.get("dtype", torch.bfloat16), settings.pop("saving", ()), **tied)
    save_adapter("adapter", load_base("base", **loading), **settings)
    reference = PeftModel.from_pretrained(load_base("base", **loading), "adapter").merge_and_unload()

    merged = merge()

    assert_same_bits(merged, reference.state_dict())
    kind = AutoModelForSequenceClassification if "classes" in loading else AutoModelForCausalLM
    reloaded, report = kind.from_pretrained("merged", torch_dtype="auto", output_loading_info=True)
    assert_same_bits(reloaded.state_dict(), reference.state_dict())
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert reloaded.config.vocab_size == reference.config.vocab_size
    assert reloaded.config.num_labels == reference.config.num_labels


@pytest.mark.parametrize(
    "variant", ["llama, all linear", "gpt2, Conv1D", "DoRA", "embedding and head", "trainable tokens", "fp32"]
)
def test_cutting_tensors_into_chunks_changes_no_bit(variant, monkeypatch):
    monkeypatch.setattr(align.merge.arithmetic, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(align.merge.arithmetic, "CHUNK_ROWS", 16)
    test_merge_equals_that_of_peft_to_the_last_bit(variant)


@pytest.mark.parametrize(("base_dtype", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtype_casts_the_base_as_loading_it_would(base_dtype, dtype):
    save_base("base", dtype=getattr(torch, base_dtype))
    save_adapter("adapter", load_base("base"), target_modules=LINEAR)
    base = load_base("base", getattr(torch, dtype))
    reference = PeftModel.from_pretrained(base, "adapter").merge_and_unload()

    merged = merge("--dtype", dtype)

    assert_same_bits(merged, reference.state_dict())
    assert AutoModelForCausalLM.from_pretrained("merged", torch_dtype="auto").dtype == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        ("the adapter has target_parameters", {"target_parameters": ["mlp.down_proj.weight"]}),
        ("init_lora_weights=pissa", {"init_lora_weights": "pissa"}),
    ],
)
def test_what_cannot_be_streamed_goes_through_peft_and_says_so(reason, settings, caplog):
    caplog.set_level("INFO")
    save_base("base")
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"], **settings)
    reference = PeftModel.from_pretrained(load_base("base"), "adapter").merge_and_unload()
    invalid = {"temperature": 0.5, "do_sample": False}  # transformers refuses to save it
    Path("base/generation_config.json").write_text(json.dumps(invalid))

    merged = merge()

    assert_same_bits(merged, reference.state_dict())
    assert json.loads(Path("merged/generation_config.json").read_text()) == invalid
    assert f"Merging through PEFT, with the whole model in memory: {reason}" in caplog.text


def test_through_peft_too_an_adapter_of_no_kind_is_one_line_and_what_it_lacks_is_told(caplog):
    save_base("base")
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"])
    path = Path("adapter/adapter_config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"peft_type": "lora"}))
    with pytest.raises(InputError, match="adapter_config.json: peft_type is 'lora', none of ADALORA, .*LORA"):
        merge()
    path.write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    tensors = load_file("adapter/adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if ".1." not in name}, "adapter/adapter_model.safetensors"
    )

    merge()

    assert "adapter lacks 2 tensors that its adapter_config.json names, such as base_model.model." in caplog.text


@pytest.mark.parametrize(
    "config", [LoraConfig(target_parameters=["mlp.down_proj.weight"]), LoHaConfig(target_modules=["q_proj"])]
)
def test_through_peft_too_updates_that_are_zero_are_told(config, caplog):
    save_base("base")
    get_peft_model(load_base("base"), config).save_pretrained("adapter")
    path = Path("adapter/adapter_model.safetensors")
    trained = {name: torch.ones_like(tensor) for name, tensor in load_file(path).items()}
    half = {name: tensor * (".0." in name) for name, tensor in trained.items()}
    zero = {name: tensor * 0 for name, tensor in trained.items()}
    what = "zero or too small for the base's numbers"

    for tensors, told in (
        (trained, []),
        (half, [f" updates of {path} are {what}, such as that of model.layers.1."]),
        (zero, [f"every update of {path} is {what}, so the merged model is the base"]),
    ):
        caplog.clear()
        save_file(tensors, path)
        merge("--overwrite")
        assert [words for words in told if words in caplog.text] == told
        assert ("zero" in caplog.text) == bool(told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda weights: {"state_dict": weights}, "base holds no weights for lm_head.weight"),
        (lambda weights: {**weights, "model.norm.weight": print}, "base cannot be loaded: "),
    ],
)
def test_through_peft_too_a_base_that_is_not_whole_or_runs_code_is_one_line(content, told):
    save_base("base")
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"])
    weights = load_file("base/model.safetensors")
    Path("base/model.safetensors").unlink()
    torch.save(content(weights), "base/pytorch_model.bin", _use_new_zipfile_serialization=False)

    with pytest.raises(InputError, match=told):
        merge()

    assert not Path("merged").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"is_new": True}, "is_new is set, which PEFT 0.17 does not know"), ({"alpha": "8"}, "adapter: ")],
)
def test_through_peft_too_a_setting_that_is_unknown_or_no_number_is_one_line(changes, told):
    save_base("base")
    get_peft_model(load_base("base"), LoHaConfig(target_modules=["q_proj"])).save_pretrained("adapter")
    path = Path("adapter/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    with pytest.raises(InputError, match=told):
        merge()


def test_through_peft_too_a_disk_that_fills_up_is_one_line():
    save_base("base")
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"], init_lora_weights="olora")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))

    try:
        with pytest.raises(InputError, match="merged cannot be written .File too large.; nothing is left"):
            merge()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert not list(Path().glob("*merged*"))


def test_weights_may_have_any_name_that_an_index_gives():
    save_base("base", saving={"safe_serialization": False})
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"])
    reference = PeftModel.from_pretrained(load_base("base"), "adapter").merge_and_unload()
    names = torch.load("base/pytorch_model.bin")
    Path("base/pytorch_model.bin").rename("base/weights.pth")
    Path("base/pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "weights.pth")})
    )

    assert_same_bits(merge(), reference.state_dict())


def save_model_that_sees_pictures(folder):
    """Gemma 3: `language_model.model.layers…` in its files, `model.language_model.layers…` in an adapter's."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    text = {**heads, "vocab_size": 512, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    ids = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    pictures = {**heads, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=pictures, mm_tokens_per_image=4, **ids)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def test_a_model_that_sees_pictures_has_other_names_on_disk_and_goes_through_peft():
    save_model_that_sees_pictures("base")
    save_adapter("adapter", load_base("base", torch.float32), target_modules=["q_proj"], task_type="CAUSAL_LM")
    PeftModel.from_pretrained(load_base("base", torch.float32), "adapter").merge_and_unload().save_pretrained("plain")

    merged = merge()

    plain, base = load_file("plain/model.safetensors"), load_file("base/model.safetensors")
    assert merged.keys() == plain.keys() == base.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in plain.items())
    assert not all(torch.equal(tensor, merged[name]) for name, tensor in base.items())


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("trained", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_tied_head_of_a_model_that_sees_pictures_is_as_trained(trained, is_streamed):
    save_model_that_sees_pictures("base")
    save_adapter("adapter", load_base("base", torch.float32), **{"target_modules": ["q_proj"], **trained})
    adapted = PeftModel.from_pretrained(load_base("base", torch.float32), "adapter").eval()
    if is_streamed:  # with the names of the modules on disk
        tensors = AutoModelForCausalLM.from_pretrained("base").state_dict()
        save_file(
            {name: tensors[name].clone() for name in tensors if name != "lm_head.weight"}, "base/model.safetensors"
        )

    merge()

    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged").eval()
        assert torch.allclose(merged(IDS).logits, adapted(IDS).logits, atol=1e-5)


def test_adapter_that_changes_no_weights_cannot_be_merged():
    save_base("base", dtype=torch.float32)
    get_peft_model(load_base("base"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        "adapter"
    )

    with pytest.raises(InputError, match="PROMPT_TUNING changes no weights, so cannot merge"):
        merge()

    assert not Path("merged").exists()


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}], ids=["streamed", "through PEFT"])
@pytest.mark.parametrize(
    "trained",
    [
        {"target_modules": ["c_attn", "lm_head"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    ],
)
def test_merged_model_gives_the_logits_of_base_and_adapter_where_the_head_was_tied(trained, settings):
    save_base("base", "gpt2", torch.float32)
    save_adapter("adapter", load_base("base", torch.float32), **trained, **settings)
    adapted = PeftModel.from_pretrained(load_base("base", torch.float32), "adapter").eval()

    merge()

    with torch.no_grad():
        expected, got = (
            model(IDS).logits for model in (adapted, AutoModelForCausalLM.from_pretrained("merged").eval())
        )
    assert torch.allclose(got, expected, atol=1e-5)


def test_checkpoint_of_a_bare_model_gets_the_names_that_a_causal_model_has():
    save_base("whole", "gpt2")
    load_base("whole").transformer.save_pretrained("base")
    save_adapter("adapter", load_base("base"), target_modules=["c_attn", "lm_head"], task_type="CAUSAL_LM")

    merged = merge()

    assert "transformer.h.0.attn.c_attn.weight" in merged
    _, report = AutoModelForCausalLM.from_pretrained("merged", output_loading_info=True)
    assert not report["missing_keys"]


def test_a_bare_tied_checkpoint_gets_a_head_of_its_own_where_the_embedding_is_trained():
    """Neither `architectures` (LlamaModel) nor `task_type` (none) names a causal model; the adapter's names do."""
    save_base("whole", dtype=torch.float32, tie_word_embeddings=True)
    load_base("whole", torch.float32).model.save_pretrained("base")
    save_adapter("adapter", load_base("base", torch.float32), target_modules=["embed_tokens"])
    adapted = PeftModel.from_pretrained(load_base("base", torch.float32), "adapter").eval()

    merge()

    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged").eval()
        assert torch.allclose(merged(IDS).logits, adapted(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("settings", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [5]}])
def test_an_embedding_that_peft_trains_without_its_scale_is_told(settings, caplog):
    save_base("base", "gemma3_text", head_dim=16)
    save_adapter("adapter", load_base("base"), **{"target_modules": ["q_proj"], **settings}, task_type="CAUSAL_LM")

    merge()

    assert "adapts the embedding of a gemma3_text model, whose scale PEFT leaves out until the merge" in caplog.text


def test_a_head_of_another_name_is_untied_under_that_name():
    save_base("base", "biogpt", torch.float32)
    model = load_base("base", torch.float32)
    save_adapter("adapter", model, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    adapted = PeftModel.from_pretrained(load_base("base", torch.float32), "adapter").eval()

    merge()

    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained("merged").eval()
        assert torch.allclose(merged(IDS).logits, adapted(IDS).logits, atol=1e-5)


def test_merged_folder_has_tokenizer_template_configuration_and_lineage():
    save_base("base")
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    tokenizer.save_pretrained("adapter")
    Path("base/optimizer.pt").write_text("not for users")

    merge()

    merged = AutoTokenizer.from_pretrained("merged")
    assert merged.apply_chat_template([{"content": "hi"}], tokenize=False) == "<hi>"
    assert Path("merged/generation_config.json").read_text() == Path("base/generation_config.json").read_text()
    assert Path("merged/config.json").read_text() == Path("base/config.json").read_text()
    assert not Path("merged/optimizer.pt").exists()
    assert json.loads(Path("merged/merge_info.json").read_text())["merges"][0]["base_model"] == "base"
    assert "Base model: base" in Path("merged/README.md").read_text()
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []


def test_base_is_the_one_that_the_adapter_names():
    save_base("base")
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"])
    expected = merge()

    merge_peft_adapter.main(["--adapter_model_name", "adapter", "--output_name", "adapter/merged"])

    assert_same_bits(load_file("adapter/merged/model.safetensors"), expected)


def test_merging_the_same_adapter_twice_or_into_another_base_warns(caplog):
    save_base("base")
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"])

    merge()
    first = caplog.text
    merge(base="merged", output="again")

    assert "Warning" not in first
    assert "merged already holds this adapter" in caplog.text
    assert "the adapter was trained on base, not on --base_model_name merged" in caplog.text
    assert len(json.loads(Path("again/merge_info.json").read_text())["merges"]) == 2


def test_guide_command_merges_a_hub_model_from_the_cache_without_network(monkeypatch):
    snapshot = Path("cache/models--meta-llama--Llama-2-70b-hf/snapshots/abc")
    save_base(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    save_adapter("sft", load_base(snapshot), target_modules=["q_proj", "v_proj"])
    arguments = (
        '--base_model_name="meta-llama/Llama-2-70b-hf" --adapter_model_name="sft" '
        '--output_name="sft/final_merged_checkpoint"'
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("cache").absolute()))

    merge_peft_adapter.main(arguments.replace('"', "").split())

    reference = PeftModel.from_pretrained(load_base(snapshot), "sft").merge_and_unload().state_dict()
    assert_same_bits(load_file("sft/final_merged_checkpoint/model.safetensors"), reference)


def test_push_uploads_the_merged_folder_and_only_when_asked(monkeypatch):
    calls = []
    for name in ("whoami", "create_repo", "upload_folder"):
        monkeypatch.setattr(
            f"huggingface_hub.HfApi.{name}", lambda self, *names, _=name, **settings: calls.append((_, names, settings))
        )
    save_base("base")
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"])

    merge()
    quiet = list(calls)
    merge("--push_to_hub", "me/model", "--overwrite")

    assert quiet == []
    assert [name for name, _, _ in calls] == ["whoami", "create_repo", "upload_folder"]
    assert calls[-1][2] == {"folder_path": Path("merged").absolute(), "repo_id": "me/model"}


def test_neither_transformers_nor_peft_nor_the_plugin_is_imported():
    save_base("base", saving={"safe_serialization": False})
    save_adapter("adapter", load_base("base"), target_modules=["q_proj"])
    code = (
        "import sys, merge_peft_adapter as script\n"
        "script.main(['--adapter_model_name', 'adapter', '--output_name', 'merged'])\n"
        "print({'torch', 'transformers', 'peft', 'habana_frameworks', 'numpy', 'matplotlib'} & set(sys.modules))"
    )

    command, environment = [sys.executable, "-c", code], {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert set(done.stdout.strip("{}\n").replace("'", "").split(", ")) == {"torch", "numpy"}
