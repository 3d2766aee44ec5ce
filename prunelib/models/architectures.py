"""What is known about model families: where layers are, what a configuration says about them, how blocks connect."""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

SLICED_MODEL_TYPE = "prunelib_sliced"
"""Model type of sliced models (`prunelib.slicing.modeling`): their layers differ in width."""

SUBLAYERS = ("attn", "mlp")
"""The sublayers of a decoder layer, in order; (3, "attn") is the attention of layer 3."""


class UnsupportedModel(ValueError):
    """The request cannot be met for this kind of model; the message names the model type and the reason."""


# Where the decoder layers are; the first path that leads to a ModuleList is taken.
PATHS = (
    "model.layers",
    "model.language_model.layers",  # text tower of a multimodal model
    "model.decoder.layers",  # OPT
    "gpt_neox.layers",
    "transformer.h",  # GPT-2, GPT-Neo, GPT-J, Falcon, BLOOM
    "transformer.blocks",  # MPT
    "biogpt.layers",
    "backbone.layers",  # Mamba
)

# What the norm behind the layers is called, beside them; the first name that leads to a module is taken.
FINAL_NORMS = ("norm", "final_layernorm", "final_norm", "embedding_norm", "norm_f", "final_layer_norm", "ln_f")
FINAL_NORMS += ("layernorm", "layer_norm")

# Where a decoder layer keeps its two sublayers; the first name that leads to a module is taken.
SUBLAYER_NAMES = {
    "attn": ("self_attn", "attention", "attn", "self_attention", "linear_attn"),
    "mlp": ("mlp", "feed_forward", "ffn", "fc2"),  # OPT's layer holds the two matrices itself
}

# The last matrix of a sublayer, attention or MLP; each expert of a mixture has one, and so has a shared expert.
OUTPUT_NAMES = ("o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "w2", "wo")

# Attributes in which a module remembers which layer it belongs to (the key-value cache is addressed by it).
LAYER_INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number", "layer_index")

# Configuration fields with one entry per layer. By name only: another list may have L entries by coincidence.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attention_layers")
PER_LAYER_LISTS += ("layer_rope_theta", "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "indexer_types")
PER_LAYER_LISTS += ("swiglu_limits", "swiglu_limits_shared")
PER_LAYER_LISTS += ("num_experts", "moe_topk", "num_shared_expert")  # Hunyuan: one number, or one per layer

# Configuration fields that list the indices of certain layers.
LAYER_INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "attn_layer_indices")

# Configuration fields that count how many of the first layers are dense; the others are mixtures of experts.
DENSE_PREFIX_COUNTS = ("first_k_dense_replace", "num_dense_layers")

# Families whose checkpoint format cannot say what is left after a free choice of layers.
SHARED_KV = "later layers reuse the keys and values of earlier ones, and per-layer embeddings share one packed table"
INEXPRESSIBLE = dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), SHARED_KV)
INEXPRESSIBLE |= dict.fromkeys(("zamba", "zamba2"), "one attention block is shared by layers at fixed places")
INEXPRESSIBLE["jamba"] = "attention and expert layers are placed by period and offset (attn_layer_period, expert_layer_period)"


@dataclass(frozen=True)
class Sublayer:
    """One addition to the residual stream: a norm of it, then modules one after the other. Paths start at the layer.

    inputs: linear maps that read the normed stream. output: the one that writes to the stream. attention: the first module
    takes the layer's keyword arguments and returns its output in a tuple.
    """

    norm: str
    modules: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    attention: bool = False


@dataclass(frozen=True)
class Architecture:
    """How the blocks of a family hang on the residual stream. Paths start at the model.

    embeddings: tables whose outputs add up to the first hidden states. centered: the norms subtract the mean (LayerNorm).
    norm_offset: what the norms add to their weight. parallel: attention and MLP read the same hidden states; True, False, or
    the configuration field that says so. dropout: configuration field with the dropout of what the branches add.
    """

    attn: Sublayer
    mlp: Sublayer
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    centered: bool = False
    norm_offset: float = 0.0
    parallel: bool | str = False
    dropout: str | None = None

    def steps(self, config: PreTrainedConfig) -> tuple[tuple[Sublayer, ...], ...]:
        """Branches of one layer: those of a step read the same hidden states, and each step ends in one shortcut."""
        parallel = getattr(config, self.parallel) if isinstance(self.parallel, str) else self.parallel
        return ((self.attn, self.mlp),) if parallel else ((self.attn,), (self.mlp,))


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTN = Sublayer("input_layernorm", ("self_attn",), _QKV, "self_attn.o_proj", attention=True)
_MLP = Sublayer("post_attention_layernorm", ("mlp",), ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_LLAMA = Architecture(_ATTN, _MLP)

ARCHITECTURES: dict[str, Architecture] = dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"), _LLAMA)
ARCHITECTURES |= {
    "gemma": replace(_LLAMA, norm_offset=1.0),
    "phi3": Architecture(
        replace(_ATTN, inputs=("self_attn.qkv_proj",)),
        replace(_MLP, inputs=("mlp.gate_up_proj",)),
        dropout="resid_pdrop",
    ),
    "phi": Architecture(
        replace(_ATTN, output="self_attn.dense"),
        Sublayer("input_layernorm", ("mlp",), ("mlp.fc1",), "mlp.fc2"),
        final_norm="model.final_layernorm",
        centered=True,
        parallel=True,
        dropout="resid_pdrop",
    ),
    "gpt_neox": Architecture(
        Sublayer("input_layernorm", ("attention",), ("attention.query_key_value",), "attention.dense", attention=True),
        Sublayer("post_attention_layernorm", ("mlp",), ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        embeddings=("gpt_neox.embed_in",),
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        centered=True,
        parallel="use_parallel_residual",
        dropout="hidden_dropout",
    ),
    "opt": Architecture(
        replace(_ATTN, norm="self_attn_layer_norm", output="self_attn.out_proj"),
        Sublayer("final_layer_norm", ("fc1", "activation_fn", "fc2"), ("fc1",), "fc2"),
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        centered=True,
        dropout="dropout",
    ),
}
"""Families whose residual stream can be rewritten: norms before the branches (not behind: Gemma 2 and 3, OLMo 2), no router."""
