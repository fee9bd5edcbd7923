"""One tiny random model for each row of the table in align/models/families.py."""

import json
from pathlib import Path

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0}
WINDOW = {"sliding_window": 8}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
DEEPSEEK |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
DEEPSEEK |= {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
DERIVED = {"deepseek_v3": ("qk_head_dim", "head_dim", "rope_interleave")}  # what published folders leave out
HEAD = {"head_dim": 16}
# PEFT adapts no `out_proj` of theirs (tuners/lora/model.py, MAMBA_MODEL_TYPES)
WITH_A_STATE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2")
SOFT_CAPS = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 5.0}
NO_DROPOUT = {"dropout": 0, "attention_dropout": 0, "activation_dropout": 0}

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 64}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.5] * 6}
CONFIGS = {  # row: (model_type, what differs from SIZES)
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "codegen": ("codegen", GPT2 | {"rotary_dim": 8}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", ALTERNATING),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "falcon": ("falcon", {"multi_query": True}),
    "falcon (40B layout)": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon (many heads)": ("falcon", {"multi_query": False}),
    "falcon (ALiBi)": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8, "time_step_rank": 8}),
    "gemma": ("gemma", HEAD),
    "gemma2": ("gemma2", HEAD | SOFT_CAPS),
    "gemma2 (window)": ("gemma2", HEAD | WINDOW | SOFT_CAPS),
    "gemma3_text": ("gemma3_text", HEAD | ALTERNATING | {"query_pre_attn_scalar": 16}),
    "glm4": ("glm4", HEAD),
    "gpt2": ("gpt2", GPT2),
    "gpt_bigcode": ("gpt_bigcode", GPT2),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_oss": ("gpt_oss", HEAD | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}),
    "granite": ("granite", {}),
    "llama": ("llama", {}),
    "llama (linear positions)": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "mamba": ("mamba", {"state_size": 8, "time_step_rank": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral (window)": ("mistral", WINDOW),
    "mixtral": ("mixtral", {"sliding_window": None, "num_local_experts": 4}),
    "mixtral (window)": ("mixtral", WINDOW | {"num_local_experts": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512, "expansion_ratio": 2}),
    "nemotron": ("nemotron", {}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phi (grouped heads)": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3 (window)": ("phi3", WINDOW),
    "qwen2": ("qwen2", {"sliding_window": None}),
    "qwen2 (window)": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 64}),
    "qwen3": ("qwen3", HEAD),
    "qwen3_moe": ("qwen3_moe", EXPERTS | HEAD),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", WINDOW),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4} | NO_DROPOUT),
    # in the shape of models that people use
    "qwen2.5": ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True, "sliding_window": 32768}),
    "llama-3": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA_3, "rms_norm_eps": 1e-5}),
    "phi-4": ("phi3", {"rope_theta": 25e4, "sliding_window": None}),
    "phi-4-mini": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 256,
        },
    ),
    "gemma3-270m": (
        "gemma3_text",
        {"head_dim": 32, "num_key_value_heads": 1, "query_pre_attn_scalar": 32, "num_hidden_layers": 6}
        | {"sliding_window": 16, "tie_word_embeddings": True, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
}
MORE_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BERT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
DBRX = {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}
DBRX |= {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8}}
DBRX |= {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2}}
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
JAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False, "attn_layer_period": 2}
JAMBA |= {"attn_layer_offset": 1}
RARE = {  # further families of transformers, which optimum-habana leaves as they are
    "arcee": ("arcee", {}),
    "bamba": ("bamba", MAMBA_2 | {"attn_layer_indices": [1]}),
    "biogpt": ("biogpt", BERT),
    "bitnet": ("bitnet", {}),
    "ctrl": ("ctrl", {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 128, "resid_pdrop": 0, "embd_pdrop": 0}),
    "dbrx": ("dbrx", DBRX),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "dots1": ("dots1", ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
    "ernie4_5": ("ernie4_5", HEAD),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_intermediate_size": 32, "moe_k": 2, "moe_num_experts": 4}),
    "exaone4": ("exaone4", ALTERNATING),
    "falcon_h1": ("falcon_h1", MAMBA_2 | {"mamba_d_ssm": 128}),
    "glm": ("glm", HEAD),
    "glm4_moe": ("glm4_moe", ROUTED | HEAD),
    "gpt_neox_japanese": ("gpt_neox_japanese", {"attention_dropout": 0, "hidden_dropout": 0}),
    "granitemoe": ("granitemoe", MORE_EXPERTS),
    "granitemoehybrid": (
        "granitemoehybrid",
        MAMBA_2 | MORE_EXPERTS | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    ),
    "granitemoeshared": ("granitemoeshared", MORE_EXPERTS | {"shared_intermediate_size": 32}),
    "helium": ("helium", HEAD),
    "jamba": ("jamba", JAMBA | {"num_experts": 4}),
    "jetmoe": ("jetmoe", MORE_EXPERTS | {"kv_channels": 16}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "mamba2": ("mamba2", {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "minimax": (
        "minimax",
        MORE_EXPERTS | HEAD | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    ),
    "modernbert-decoder": ("modernbert-decoder", {"attention_dropout": 0, "local_attention": 16}),
    "olmoe": ("olmoe", EXPERTS),
    "openai-gpt": ("openai-gpt", GPT2),
    "phimoe": ("phimoe", MORE_EXPERTS),
    "zamba": ("zamba", JAMBA | {"n_mamba_heads": 2, "num_hidden_layers": 4}),
}
CONFIGS |= RARE


def save_family_model(folder: Path, row: str, **changes) -> Path:
    """Weights so wide that a wrong mask, position or norm moves every logit."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, sizes = CONFIGS[row]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | sizes | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(0, 0.2)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in DERIVED.get(model_type, ()):
        del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    return folder
