"""How the blocks of each model family hang on the residual stream: which modules read it and which write to it."""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

SLICED_MODEL_TYPE = "prunelib_sliced"
"""Model type of sliced models (`prunelib.slicing.modeling`): their layers differ in width."""

SUBLAYERS = ("attn", "mlp")
"""The sublayers of a decoder layer, in order; (3, "attn") is the attention of layer 3."""


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


_ATTN = Sublayer(
    norm="input_layernorm",
    modules=("self_attn",),
    inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    attention=True,
)
_MLP = Sublayer(
    norm="post_attention_layernorm",
    modules=("mlp",),
    inputs=("mlp.gate_proj", "mlp.up_proj"),
    output="mlp.down_proj",
)
_LLAMA = Architecture(_ATTN, _MLP)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": replace(_LLAMA, norm_offset=1.0),
    "phi3": Architecture(
        replace(_ATTN, inputs=("self_attn.qkv_proj",)),
        replace(_MLP, inputs=("mlp.gate_up_proj",)),
        dropout="resid_pdrop",
    ),
    "phi": Architecture(
        replace(_ATTN, output="self_attn.dense"),
        Sublayer(norm="input_layernorm", modules=("mlp",), inputs=("mlp.fc1",), output="mlp.fc2"),
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
        Sublayer(norm="final_layer_norm", modules=("fc1", "activation_fn", "fc2"), inputs=("fc1",), output="fc2"),
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        centered=True,
        dropout="dropout",
    ),
}
"""Families by model type. One more takes an entry, if its norms stand before its branches and nothing but the head reads the
stream in between: norms behind a branch (Gemma 2 and 3, OLMo 2) need their input at full width, and routers of mixtures of
experts are not in the table."""
