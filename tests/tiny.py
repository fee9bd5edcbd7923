"""Small tokenizers and models of every family, made on the spot: nothing is downloaded."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Question: What is the capital of France?\n\nAnswer: The capital of France is Paris.",
    "Hello there, how are you today? I am fine, thank you very much.",
    "System: be brief. User: what is two and two? Assistant: It is four, of course!",
]
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# kind: (sentencepiece-like, BOS, EOS, PAD, BOS added by itself, further special tokens, chat template)
TOKENIZERS = {
    "llama-2": (True, "<s>", "</s>", None, True, [], LLAMA_2),
    "llama-3": (False, "<|begin|>", "<|end|>", None, True, ["<|start|>", "<|stop|>", "<|eot|>"], LLAMA_3),
    "mistral": (True, "<s>", "</s>", "</s>", True, [], LLAMA_2),
    "qwen": (False, None, "<|im_end|>", "<|endoftext|>", False, ["<|im_start|>"], CHATML),
    "chatml-base": (False, None, "<|endoftext|>", "<|endoftext|>", False, ["<|im_start|>", "<|im_end|>"], CHATML),
    "gpt2": (False, "<|endoftext|>", "<|endoftext|>", None, False, [], None),
}


def make_tokenizer(kind: str = "llama-3", vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """A tokenizer that treats blanks, BOS, EOS and PAD as that family does, with a vocabulary of its own."""
    sentencepiece, bos, eos, pad, adds_bos, more, template = TOKENIZERS[kind]
    special = list(dict.fromkeys(token for token in ("<unk>", bos, eos, pad, *more) if token))
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(32, 127)] + ["▁", "\n"]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=more,
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in names.items() if token},
    )
    made.chat_template = template
    return made


def make_config(family: str, **changes):
    """A config of that family with two layers, small enough that a step takes milliseconds."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if family == "gpt2":
        sizes = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    if family == "mixtral":
        sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    if family in ("mistral", "qwen2"):
        sizes["sliding_window"] = None
    return AutoConfig.for_model(family, **{**sizes, **changes})


def save_model(folder: Path, family: str = "llama", tokenizer: str = "llama-3", seed: int = 0, **changes) -> Path:
    """A random model of that family with a tokenizer beside it, as `from_pretrained` finds them."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    made = make_tokenizer(tokenizer)
    ids = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id, "pad_token_id": made.pad_token_id}
    AutoModelForCausalLM.from_config(make_config(family, **ids, **changes)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


# Published sizes of the models that the recipes name, for rehearsals: without weights, and with a tokenizer of our own.
PUBLISHED = {
    "meta-llama/Llama-2-70b-hf": {
        "family": "llama",
        "tokenizer": "llama-2",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        "family": "mixtral",
        "tokenizer": "mistral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
}


def save_stand_in(folder: Path, name: str) -> Path:
    """The configuration of a published model of 32,000 tokens, and a small tokenizer filled up to as many."""
    sizes = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", **PUBLISHED[name]}
    tokenizer = make_tokenizer(sizes.pop("tokenizer"))
    tokenizer.add_tokens([f"<unused {number}>" for number in range(len(tokenizer), sizes["vocab_size"])])
    tokenizer.save_pretrained(folder)
    make_config(sizes.pop("family"), **sizes).save_pretrained(folder)
    return folder
