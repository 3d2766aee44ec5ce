"""How many tokens a second llama.cpp decodes on a processor when layers are removed, beside the memory bandwidth.

    pip install --no-deps xllamacpp && python benchmarks/llama_cpp_speed.py --folder build/llama_cpp

Contiguous blocks of layers in front of the last four are removed: which ones does not matter to the speed. One thread; a second
is one of processor time of this process. All models in every round, in random order; medians and quartiles over rounds. The
limit is the best bandwidth of a sum and of a copy in the same rounds, over the bytes of the weights, which every token needs
(the embeddings once: they are the head too). It wants an idle machine: beside other programs two runs gave speed-ups of 1.9 and
2.3 for the same file, where the bytes allow 1.5.
"""

import time
from pathlib import Path

import numpy as np
import torch
import xllamacpp
from gguf import GGUFReader
from report import options, write_report

from prunelib import models
from prunelib.models import export

PROMPT = "The river rises in the hills and runs south"


def write(model: str, folder: Path, sizes: list[int], kinds: list[str]) -> dict[tuple[str, int], Path]:
    """The GGUF files by kind and number of removed layers; those that are there are taken."""
    files = {(kind, size): folder / f"{size}-{kind}.gguf" for kind in kinds for size in sizes}
    missing = [key for key, file in files.items() if not file.is_file()]
    dense, tokenizer = (models.load(model), models.load_tokenizer(model)) if missing else (None, None)
    for kind, size in missing:
        last = len(models.decoder_layers(dense)) - 4
        export.write_gguf(models.remove_layers(dense, range(last - size, last)), tokenizer, files[kind, size], kind)
    return files


def server(file: Path) -> xllamacpp.Server:
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(file), 256, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(settings)


def decoded(one: xllamacpp.Server, tokens: int) -> float:
    """Tokens per second of processor time; the prompt, cached by an earlier call, costs one step more."""
    started = time.process_time()
    request = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    made = one.handle_completions(request)["usage"]["completion_tokens"]
    return (made + 1) / (time.process_time() - started)


def bandwidth(numbers: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes per second of processor time, of reading or of copying (both directions counted)."""
    start = time.process_time()
    numbers.sum()
    middle = time.process_time()
    target.copy_(numbers)
    return max(numbers.nbytes / (middle - start), 2 * numbers.nbytes / (time.process_time() - middle))


def main() -> None:
    parser = options(__doc__, model="smollm2-135m-instruct", folder="build/llama_cpp", tokens=32, rounds=7, device="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 2, 4, 8, 12])
    parser.add_argument("--kinds", nargs="+", default=["f16", "q4_0"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    files = write(args.model, Path(args.folder), args.sizes, args.kinds)
    servers, numbers = {key: server(file) for key, file in files.items()}, torch.randn(2**26)
    target = torch.empty_like(numbers)
    for one in servers.values():
        decoded(one, 2)
    rates = {key: [] for key in ("read", *servers)}
    order = np.random.default_rng(0)
    for _ in range(args.rounds):
        rates["read"].append(bandwidth(numbers, target))
        for index in order.permutation(len(servers)):
            key = [*servers][index]
            rates[key].append(decoded(servers[key], args.tokens))
    read, rows = max(rates["read"]), []
    weights = {key: int(sum(tensor.n_bytes for tensor in GGUFReader(file).tensors)) for key, file in files.items()}
    for kind, size in files:
        low, middle, high = np.quantile(rates[kind, size], (0.25, 0.5, 0.75))
        row = {"kind": kind, "layers_removed": size, "tokens_per_s": middle, "low": low, "high": high}
        speedup = float(np.median(np.divide(rates[kind, size], rates[kind, args.sizes[0]])))
        row |= {"speedup": speedup, "limit_speedup": weights[kind, args.sizes[0]] / weights[kind, size]}
        row |= {"bytes": weights[kind, size], "limit": read / weights[kind, size]}
        rows.append(row)
        print(" ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()))
    write_report(args.output, args, {"bytes_per_s": rates["read"], "rows": rows}, without=("folder",))


if __name__ == "__main__":
    main()
