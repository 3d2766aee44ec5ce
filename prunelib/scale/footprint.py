"""What fits where: peak memory of streamed and resident passes, planned from sizes alone. Nothing here imports torch.

`planned` is the formula by which `prunelib.scale.offload` refuses work that does not fit, `what_fits_where` the table for published
shapes made with it. Bytes are an upper bound: `benchmarks/streaming_cost.py` and the tests hold it against measured peaks.

    python -m prunelib.scale.footprint > data/footprint.csv
"""

import csv
import sys
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30

PROCESS = int(0.7 * GIB)
"""Python with torch and transformers, before any work."""

BOXES = 3
"""Batches on their way to the accelerator, and back, at a time."""

_LIBRARIES = GIB // 8  # workspaces of matrix products on an accelerator, one per stream
_SUMS = 3 * GIB // 4  # chunks of states and float64 work of the statistics on an accelerator, whatever the model
_SUMS_CPU = 32 * 2**20  # they stay in cache there


@dataclass(frozen=True)
class Sizes:
    """What the peaks depend on. Bytes are those of the weights in memory; `layer_bytes` is the largest layer.

    attention, key_value, mlp: widths of all query heads together, of all key heads, and inside the MLP (of a mixture of
    experts: of the experts that one token meets). stored_layer_bytes: of the largest layer in the file, if its dtype differs.
    """

    n_layers: int
    hidden: int
    attention: int
    key_value: int
    mlp: int
    vocabulary: int
    number_bytes: int
    layer_bytes: int
    table_bytes: int
    head_bytes: int
    stored_layer_bytes: int | None = None

    @property
    def weights(self) -> int:
        """Bytes of a resident model of equal layers."""
        return self.n_layers * self.layer_bytes + self.table_bytes + self.head_bytes


def sizes(config: Mapping, number_bytes: int = 2) -> Sizes:
    """`Sizes` of a Llama-like model from the fields of its config.json. Raises KeyError for a field that is not there."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    attention = config["num_attention_heads"] * head
    key_value = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head
    table = config["vocab_size"] * hidden * number_bytes
    return Sizes(
        n_layers=config["num_hidden_layers"],
        hidden=hidden,
        attention=attention,
        key_value=key_value,
        mlp=mlp,
        vocabulary=config["vocab_size"],
        number_bytes=number_bytes,
        layer_bytes=number_bytes * hidden * (2 * attention + 2 * key_value + 3 * mlp + 2),
        table_bytes=table,
        head_bytes=0 if config.get("tie_word_embeddings") else table,
    )


@dataclass(frozen=True)
class Peak:
    """Planned bytes, by phase of the work: on the accelerator (empty without one) and in the memory of the host."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def device_peak(self) -> int:
        return max(self.device.values(), default=0)

    @property
    def host_peak(self) -> int:
        return max(self.host.values())

    def describe(self) -> str:
        """One line to print before the work starts."""
        told = []
        for where, phases in (("on the device", self.device), ("on the host", self.host)):
            if phases:
                parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in phases.items())
                told.append(f"{max(phases.values()) / GIB:.2f} GiB {where} ({parts})")
        return "planned peak memory: " + "; ".join(told)


def planned(
    sizes: Sizes,
    *,
    batch_size: int,
    seq_len: int,
    windows_at_once: int,
    states: bool,
    logits: bool,
    accelerator: bool,
) -> Peak:
    """Peak memory of one streamed pass.

    windows_at_once: windows that go through a layer before the next one is read. states: all hidden states of these windows
    are kept (statistics), not only the newest; beside an accelerator those of as many windows before them, too, which are
    reduced meanwhile. logits: the head runs at the end, window by window (perplexity). The resident
    pass of the same batch needs `sizes.weights` and what a batch takes here.
    """
    number, tokens = sizes.number_bytes, batch_size * seq_len
    stored = sizes.stored_layer_bytes or sizes.layer_bytes
    # Two layers as they are in the file, one that works and one on its way; in another dtype also a converted copy.
    layers = 2 * stored + (sizes.layer_bytes if sizes.stored_layer_bytes not in (None, sizes.layer_bytes) else 0)
    attention = 3 * sizes.hidden + 5 * sizes.attention + 4 * sizes.key_value
    branch = max(attention, 3 * sizes.hidden + 3 * sizes.mlp)
    # Norms compute in float32: the stream, its copy, and two steps of the norm.
    batch = tokens * max(number * branch, sizes.hidden * (2 * number + 12))
    kept = windows_at_once * seq_len * sizes.hidden * number
    kept *= (2 if accelerator else 1) * (sizes.n_layers + 1) if states else 1
    # Float32 copies for the log-likelihood: of the scored logits and of their logarithms.
    head = (sizes.head_bytes or sizes.table_bytes) + seq_len * (
        sizes.vocabulary * (number + 8) + sizes.hidden * (2 * number + 12)
    )
    state_sums = (_SUMS if accelerator else _SUMS_CPU) if states else 0
    host = {"process": PROCESS, "embeddings": sizes.table_bytes, "hidden states": kept}
    if accelerator:
        lanes = 2 * BOXES * tokens * sizes.hidden * number
        device = {"layers and sums" if states else "layers": layers + lanes + batch + state_sums}
        device |= {"head": head} if logits else {}
        device = {name: size + _LIBRARIES for name, size in device.items()}
        together = host | {"layers in page-locked memory": 2 * stored}
        return Peak(device, {"all": sum(together.values())})
    ends = {"layers": layers + batch, "sums": layers + state_sums}
    ends |= {"head": head - (sizes.table_bytes if not sizes.head_bytes else 0)} if logits else {}
    return Peak({}, {name: sum(host.values()) + size for name, size in ends.items()})


# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size, tied
SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256, False),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000, False),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256, False),
    "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128256, False),
}
_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


def what_fits_where(seq_len: int = 2048, *, host_gib: float | int = 32) -> list[dict[str, float | int | str]]:
    """One row per published shape, in bfloat16 and GiB: resident weights, and streamed statistics and perplexity.

    Batches are of one window, the smallest setting; `windows_at_once` is what a host with `host_gib` can hold (at least one
    window), of whose hidden states the statistics need all at once.
    """
    rows = []
    for name, shape in SHAPES.items():
        sizes_ = sizes(dict(zip(_FIELDS, shape, strict=True)))
        common = {"batch_size": 1, "seq_len": seq_len, "accelerator": True}
        at_once = windows_that_fit(sizes_, int(host_gib * GIB), batch_size=1, seq_len=seq_len, states=True, accelerator=True)
        statistics = planned(sizes_, **common, windows_at_once=max(1, at_once), states=True, logits=False)
        likelihood = planned(sizes_, **common, windows_at_once=1, states=False, logits=True)
        processor = planned(sizes_, **(common | {"accelerator": False}), windows_at_once=1, states=True, logits=False)
        rows.append(
            {
                "model": name,
                "weights": round(sizes_.weights / GIB, 1),
                "one layer": round(sizes_.layer_bytes / GIB, 2),
                "statistics, GPU": round(statistics.device_peak / GIB, 2),
                "statistics, host": round(statistics.host_peak / GIB, 1),
                "windows at once": max(1, at_once),
                "perplexity, GPU": round(likelihood.device_peak / GIB, 2),
                "statistics, CPU only": round(processor.host_peak / GIB, 1),
            }
        )
    return rows


def windows_that_fit(
    sizes: Sizes, host: int, *, batch_size: int, seq_len: int, states: bool, accelerator: bool, logits: bool = False
) -> int:
    """How many windows may be at once in a host memory of so many bytes, in whole batches; 0 when not even one batch."""
    setting = {"batch_size": batch_size, "seq_len": seq_len, "states": states, "logits": logits, "accelerator": accelerator}
    none = planned(sizes, windows_at_once=0, **setting).host_peak
    batch = planned(sizes, windows_at_once=batch_size, **setting).host_peak - none
    return max(0, (host - none) // batch) * batch_size


def main() -> None:
    rows = what_fits_where()
    table = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)


if __name__ == "__main__":
    main()
