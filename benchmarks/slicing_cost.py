"""What slicing costs: wall time and peak memory of `prunelib.slicing.slice_model`, with the floor beside it.

    python benchmarks/slicing_cost.py                              # the shape of the main reference model, on the CPU
    python benchmarks/slicing_cost.py --shape llama-2-7b --device cuda --dtype bfloat16 --samples 128 --tokens 2048

Weights and tokens are random: no time depends on them. The model stays on the CPU. The floor is what no implementation of the
method avoids, measured in the same run on the same device: one forward pass over the calibration windows without the head, and
one eigendecomposition in float64 of every place's moments. Published for Llama-2-7B: 44 minutes on an H100, at 1,024 samples of
2,048 tokens.
"""

import json

import torch
from report import measured, options, write_report
from transformers import PreTrainedModel

from prunelib.slicing import constant, count_parameters, slice_model
from prunelib.speed.shapes import random_model, shape_configuration


@torch.no_grad()
def floor(model: PreTrainedModel, windows: torch.Tensor, batch: int, device: torch.device) -> dict[str, float]:
    """Seconds of one forward pass without the head, and of the eigendecompositions; the model must fit on the device."""
    size, places = model.config.hidden_size, 2 * model.config.num_hidden_layers
    moments = torch.randn(size, 2 * size, dtype=torch.float64, device=device)
    moments = moments @ moments.T
    torch.linalg.eigh(moments)  # the first call sets up the library
    _, eigen = measured(device, lambda: [torch.linalg.eigh(moments) for _ in range(3)])
    model = model.to(device)
    model.model(windows[:batch].to(device), use_cache=False)

    def forward() -> None:
        for rows in windows.split(batch):
            model.model(rows.to(device), use_cache=False)

    _, passed = measured(device, forward)
    model.cpu()
    return {"forward_s": passed["seconds"], "eigendecompositions_s": eigen["seconds"] / 3 * places}


def main() -> None:
    machine = {"device": torch.device("cpu"), "dtype": "float32", "threads": torch.get_num_threads()}
    parser = options(__doc__, shape="ref-llama-32l", **machine, samples=32, tokens=256, batch=8, slice=0.3)
    parser.add_argument("--no-floor", action="store_true", help="for models that do not fit on the device")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    device = settings.device

    model = random_model(shape_configuration(settings.shape), dtype=settings.dtype, device=device).cpu()
    config = model.config
    windows = torch.randint(0, config.vocab_size, (settings.samples, settings.tokens))
    plan = constant(config.num_hidden_layers, config.hidden_size, settings.slice, multiple=8)
    report = {"removed": round(count_parameters(config, plan).removed, 4)}
    if not settings.no_floor:
        report |= floor(model, windows, settings.batch, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    _, found = measured(device, lambda: slice_model(model, plan, windows, batch_size=settings.batch, device=device))
    report |= {"slicing_s": found["seconds"], "peak_gib": found["peak_gib"]}
    print(json.dumps(report, indent=1))
    write_report(settings.output, settings, report)


if __name__ == "__main__":
    main()
