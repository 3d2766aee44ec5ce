"""Slicing against the published implementation: the same perplexity on the same tokens, and how long each takes.

    git clone https://github.com/microsoft/TransformerCompression ../TransformerCompression
    git -C ../TransformerCompression checkout 6b12cdee6ad51791d7c776b3a046bc408b9e77e9
    pip install ml_collections
    python benchmarks/slicing_vs_reference.py --reference ../TransformerCompression

Nothing of the clone is installed or changed, and none of its code is here. It was written for transformers 4.41, where
attention returned three values and layers returned tuples; the two classes below put its layers into a model of the installed
transformers 5. Its Llama and OPT models can be compared.

It departs from the dense model in two ways that ours takes over here for the comparison: it takes the mean off the embeddings
of every model (`subtract_mean`), and its norms have an epsilon of 1e-5 whatever the model's (`ours_as_is_ppl`: neither).
Every repetition times one after the other; printed are the medians and the median ratio. The clone collects garbage several
times a layer, which small models feel most: `speed_without_cleanup` leaves that time out.
Measured, in data/benchmarks/slicing_vs_reference_*.json, on a processor and on one H200:

    --samples 16 --cpu-time --slices 0.2 0.3 --output …_ref-llama-32l.json
    --samples 16 --cpu-time --model random-opt --slices 0.25 --output …_opt.json
    --samples 16 --cpu-time --model random-llama --slices 0.25 --output …_llama.json
    --device cuda --model random-llama-7b --samples 64 --tokens 1024 --slices 0.5 --repeats 1 --output …_h200.json

Where a layer is left wider than there are different tokens in the calibration windows (2,682 here), the first axes are not
determined and the two choose differently: at 25 % the perplexities differed by 1e-3, at 5.1 times the speed.
"""

import copy
import importlib
import inspect
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
from report import options, write_report
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel

from prunelib.evaluation.perplexity import perplexity
from prunelib.io import file_sha256
from prunelib.models import load, load_tokenizer
from prunelib.slicing import SlicePlan, slice_model
from prunelib.text import corpora
from prunelib.text.windows import consecutive_windows, sample_windows

ADAPTERS = {
    "llama": ("llama_adapter", "LlamaModelAdapter", "CompressedLlamaDecoderLayer"),
    "opt": ("opt_adapter", "OPTModelAdapter", "CompressedOPTDecoderLayer"),
}
EPSILON = 1e-5
EMBEDDED = "data/reference/ref-llama-32l"


class Reference:
    """The clone's modules, without its package's own imports: data sets and hub code that nothing here needs."""

    def __init__(self, clone: Path, clock: Callable[[], float]):
        folder = clone / "src" / "slicegpt"
        if not (folder / "rotate.py").is_file():
            raise SystemExit(f"{clone} holds no src/slicegpt/rotate.py: give a clone of microsoft/TransformerCompression")
        package = types.ModuleType("slicegpt")
        package.__path__ = [str(folder)]
        sys.modules["slicegpt"] = package
        self.cleanup_seconds = 0.0
        collect = self.utils.cleanup_memory

        def timed() -> None:
            start = clock()
            collect()
            self.cleanup_seconds += clock() - start

        self.utils.cleanup_memory = self.rotate.cleanup_memory = timed

    def __getattr__(self, name: str) -> types.ModuleType:
        return importlib.import_module(f"slicegpt.{name}")

    def hashes(self) -> dict[str, str]:
        """sha256 of the clone's files that were imported."""
        modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("slicegpt.")]
        files = [Path(module.__file__) for module in modules if getattr(module, "__file__", None)]
        return {f"reference {path.name}": file_sha256(path) for path in files}

    def sliced(self, model: PreTrainedModel, windows: torch.Tensor, width: int, batch: int, device: torch.device):
        """The model itself, sliced in place to the same width everywhere, by the steps of the clone's script."""
        self.config.config.device = device
        file, adapter_name, layer_name = ADAPTERS[model.config.model_type]
        adapters = importlib.import_module(f"slicegpt.adapters.{file}")
        layer_class = _layer_class(getattr(adapters, layer_name))
        layer_type = {"compressed_layer_type": property(lambda _: layer_class)}
        adapter_class = type(adapter_name, (getattr(adapters, adapter_name),), layer_type)
        model.config.use_cache = False  # it runs each layer twice, and a cache would take in both
        adapter = adapter_class(model)
        batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in windows.split(batch)]
        self.layernorm_fusion.replace_layers(adapter)
        self.layernorm_fusion.fuse_modules(adapter)
        schedule = self.slicing_scheduler.ConstSlicingScheduler(width)
        self.rotate.rotate_and_slice(adapter, batches, schedule, final_orientation="pca")
        return adapter.model.to(device).eval()


def _layer_class(layer_class: type) -> type:
    """The clone's layer for transformers 5: called with its arguments, and returning a tensor."""
    taken = inspect.signature(layer_class.forward).parameters
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())

    class Layer(layer_class):
        def __init__(self, config, layer_idx=None):
            super().__init__(config, layer_idx)
            self.self_attn.__class__ = _attention_class(type(self.self_attn))

        def forward(self, hidden_states, **arguments):
            given = {name: value for name, value in arguments.items() if everything or name in taken}
            given.pop("past_key_values", None)
            return super().forward(hidden_states, **given)[0]

    return Layer


def _attention_class(attention_class: type) -> type:
    class Attention(attention_class):
        def forward(self, **arguments):
            for name in ("past_key_value", "layer_head_mask", "use_cache"):
                arguments.pop(name, None)
            return *super().forward(**arguments)[:2], None

    return Attention


OPT = {"ffn_dim": 432, "num_hidden_layers": 12, "num_attention_heads": 5, "word_embed_proj_dim": 160}
WIDE = {"intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4}
RANDOM = {
    # LayerNorms with a bias, learned positions
    "random-opt": OPTConfig(vocab_size=4096, hidden_size=160, max_position_embeddings=512, init_std=0.1, dropout=0.0, **OPT),
    # grouped-query attention; wide, so that arithmetic is what takes the time
    "random-llama": LlamaConfig(vocab_size=4096, hidden_size=1024, initializer_range=0.05, **WIDE),
    # four layers of Llama-2-7B, for a GPU
    "random-llama-7b": LlamaConfig(vocab_size=4096, num_hidden_layers=4),
}
"""Models to compare on beside trained ones. The weights are larger than usual, else their layers would change little."""


def random_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(RANDOM[name]).eval()
    for path, parameter in model.named_parameters():
        if "norm" in path or path.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def main() -> None:
    sizes = {"samples": 64, "tokens": 256, "batch": 8, "repeats": 3}
    parser = options(__doc__, model=EMBEDDED, device=torch.device("cpu"), threads=1, **sizes)
    parser.add_argument("--reference", type=Path, required=True, help="folder of the clone")
    parser.add_argument("--slices", type=float, nargs="+", default=[0.2, 0.25, 0.3])
    parser.add_argument("--cpu-time", action="store_true", help="of the process instead of the wall, on a busy machine")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    clock = time.process_time if settings.cpu_time else time.perf_counter
    reference = Reference(settings.reference, clock)

    if settings.model in RANDOM:
        dense, tokenizer = random_model(settings.model), load_tokenizer(EMBEDDED)
    else:
        dense, tokenizer = load(settings.model), load_tokenizer(settings.model)
    if dense.config.model_type not in ADAPTERS:
        raise SystemExit(f"model type {dense.config.model_type!r}: one of {', '.join(ADAPTERS)} can be compared")
    text = {split: corpora.load("pydocs", split) for split in ("calibration", "evaluation")}
    windows = sample_windows(text["calibration"], tokenizer, settings.samples, settings.tokens, 0, progress=False)
    held_out = consecutive_windows(text["evaluation"], tokenizer, settings.tokens, 20, progress=False)
    alike = copy.deepcopy(dense)
    alike.config.rms_norm_eps = EPSILON  # of Llama; that of OPT is the same always
    for module in alike.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = EPSILON

    how = {"batch_size": settings.batch, "device": settings.device, "progress": False}

    def ppl(model: PreTrainedModel) -> float:
        return perplexity(model.to(settings.device), held_out, batch_size=settings.batch).ppl

    def timed(work) -> tuple[PreTrainedModel, float]:
        start = clock()
        result = work()
        if settings.device.type == "cuda":
            torch.cuda.synchronize()
        return result, clock() - start

    cases = []
    for share in settings.slices:
        width = int((1 - share) * dense.config.hidden_size)
        width -= width % 8  # as in the clone
        plan = SlicePlan(dense.config.hidden_size, (width,) * dense.config.num_hidden_layers, "constant")
        seconds: dict[str, list[float]] = {"reference": [], "cleanup": [], "ours": []}
        for _ in range(settings.repeats):
            copied, reference.cleanup_seconds = copy.deepcopy(dense), 0.0
            theirs, taken = timed(lambda: reference.sliced(copied, windows, width, settings.batch, settings.device))  # noqa: B023
            seconds["reference"].append(taken)
            seconds["cleanup"].append(reference.cleanup_seconds)
            sliced, taken = timed(lambda: slice_model(alike, plan, windows, subtract_mean=True, **how))  # noqa: B023
            seconds["ours"].append(taken)
        reference_ppl, ours_ppl = ppl(theirs), ppl(sliced)
        case = {
            "slice": share,
            "width": f"{width} of {dense.config.hidden_size}",
            "dense_ppl": ppl(dense),
            "reference_ppl": reference_ppl,
            "ours_ppl": ours_ppl,
            "relative_difference": abs(ours_ppl / reference_ppl - 1),
            "ours_as_is_ppl": ppl(slice_model(dense, plan, windows, **how)),
            "reference_s": statistics.median(seconds["reference"]),
            "ours_s": statistics.median(seconds["ours"]),
            "speed": statistics.median(a / b for a, b in zip(seconds["reference"], seconds["ours"], strict=True)),
            "speed_without_cleanup": statistics.median((a - b) / c for a, b, c in zip(*seconds.values(), strict=True)),
        }
        cases.append(case)
        print(json.dumps(case, indent=2), flush=True)
    write_report(settings.output, settings, {"cases": cases}, without=("reference",), data=reference.hashes())


if __name__ == "__main__":
    main()
