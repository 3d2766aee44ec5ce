"""Tiny random causal language models of many families, by name: `build(name)` gives a seeded float32 model in eval mode.

Six layers (five for the hybrids), hidden size 32, vocabulary 128. Where a family mixes kinds of layers (windows, rotary or
not, dense or sparse), the mix is irregular enough that a wrongly renumbered list changes the logits or the weights.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

GPT = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
SMALL = {**GPT, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "max_position_embeddings": 64}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
WINDOWED = {"sliding_window": 5, "layer_types": MIXED}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "linear_attention", "full_attention"]
LINEAR = {"layer_types": HYBRID, "num_hidden_layers": 5, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPED |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 3}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0, 1, 1, 0, 1]}
LLAMA4 |= {"attention_chunk_size": 8, "intermediate_size_mlp": 48}
GPT_NEO = {"hidden_size": 32, "num_layers": 6, "num_heads": 4, "window_size": 5, "max_position_embeddings": 64}
GPT_NEO |= {"attention_types": [[["global", "local", "local"], 2]]}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
ERNIE |= {"moe_layer_start_index": 2, "moe_layer_end_index": 4}

# name -> (model type, fields of its configuration)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", SMALL),
    "llama_tied": ("llama", {**SMALL, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**SMALL, "sliding_window": 5}),
    "ministral": ("ministral", {**SMALL, **WINDOWED}),
    "qwen2": ("qwen2", SMALL),
    "qwen2_sliding": ("qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}),
    "qwen3": ("qwen3", SMALL),
    "gemma": ("gemma", SMALL),
    "gemma2": ("gemma2", {**SMALL, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", {**SMALL, **WINDOWED, "query_pre_attn_scalar": 8}),
    "phi": ("phi", SMALL),
    "phi3": ("phi3", SMALL),
    "olmo2": ("olmo2", SMALL),
    "olmo3": ("olmo3", {**SMALL, **WINDOWED}),
    "smollm3": ("smollm3", {**SMALL, "no_rope_layers": [1, 0, 1, 1, 0, 1]}),
    "granite": ("granite", {**SMALL, "residual_multiplier": 0.5}),
    "stablelm": ("stablelm", SMALL),
    "cohere2": ("cohere2", {**SMALL, **WINDOWED}),
    "exaone4": ("exaone4", {**SMALL, **WINDOWED}),
    "gpt_oss": ("gpt_oss", {**SMALL, **WINDOWED, **ROUTED}),
    "mixtral": ("mixtral", {**SMALL, **ROUTED}),
    "qwen3_moe_mlp_only": ("qwen3_moe", {**SMALL, **EXPERTS, "mlp_only_layers": [1, 4]}),
    "qwen3_moe_step_2": ("qwen3_moe", {**SMALL, **EXPERTS, "decoder_sparse_step": 2}),
    "qwen3_next": ("qwen3_next", {**SMALL, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16, "mlp_only_layers": [1]}),
    "qwen3_5_text": ("qwen3_5_text", {**SMALL, **LINEAR}),
    "deepseek_v3": ("deepseek_v3", {**SMALL, **GROUPED, **LATENT, "num_key_value_heads": 4}),
    "glm4_moe": ("glm4_moe", {**SMALL, **GROUPED}),
    "llama4_text": ("llama4_text", {**SMALL, **LLAMA4}),
    "gpt2": ("gpt2", {**GPT, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", SMALL),
    "opt": ("opt", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt_neo": ("gpt_neo", {**GPT, **GPT_NEO}),
    "falcon": ("falcon", {**GPT, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}),
    "bloom": ("bloom", {**GPT, "hidden_size": 32, "n_layer": 6, "n_head": 4}),
    "mpt": ("mpt", {**GPT, "d_model": 32, "n_layers": 6, "n_heads": 4, "max_seq_len": 64}),
    "lfm2": ("lfm2", {**SMALL, "full_attn_idxs": [1, 4], "block_multiple_of": 8}),
    "ernie4_5_moe": ("ernie4_5_moe", {**SMALL, **ERNIE}),
}


def build(name: str, seed: int = 0, **changes) -> PreTrainedModel:
    """The model `name`, its configuration changed by `changes`."""
    model_type, fields = ARCHITECTURES[name]
    return build_type(model_type, {**fields, **changes}, seed)


def build_type(model_type: str, fields: dict, seed: int = 0) -> PreTrainedModel:
    """A random model of any `model_type` that AutoModelForCausalLM knows, its configuration made of `fields`."""
    config = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norm weights, biases and routing corrections start as constants: make each layer's its own, and the
                # matrices large enough that every layer matters to the logits.
                spread = 0.05 if parameter.ndim == 1 else 0.1
                parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()
