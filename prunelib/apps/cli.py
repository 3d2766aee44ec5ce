"""The command line, `prunelib --help`: each command calls what the notebooks call, and ends with the files that it wrote and
the notebook that shows more."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from prunelib import io

Model = Annotated[str, typer.Argument(help="packaged model, folder, GGUF file or hub name of a causal language model")]
Text = Annotated[str, typer.Option(help="text on which layers are judged: NAME:SPLIT, or a text or JSONL file")]
Samples = Annotated[int, typer.Option(help="windows of that text")]
Length = Annotated[int, typer.Option(help="tokens of a window")]
Batch = Annotated[int, typer.Option(help="windows in one forward pass")]
Dtype = Annotated[str, typer.Option(help="of the weights in memory: float32, bfloat16, float16")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
Gguf = Annotated[list[str], typer.Option(help="also a GGUF file for llama.cpp: f16, q8_0 or q4_0; may be repeated")]


class Commands(typer.core.TyperGroup):
    """Says in one line what is wrong, whichever command found it."""

    def invoke(self, ctx):  # a context of click's, which typer keeps to itself
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # RuntimeErrors, too; a reader such as `head` that has enough
            raise
        except (ValueError, OSError, RuntimeError) as error:
            typer.echo(f"error: {error}", err=True)
            bad_input = not isinstance(error, RuntimeError) or type(error).__name__ == "CheckpointError"
            raise typer.Exit(2 if bad_input else 1) from None


HELP = """Which layers of a language model matter, and the model without the others.

Exit status: 0 done, 1 no result, 2 bad input, with one line that names the value and the remedy."""
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that are not needed here
app = typer.Typer(cls=Commands, help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _done(files: Iterable[Path | str], notebook: str) -> None:
    for file in files:
        typer.echo(f"wrote {io.from_root(file)}")
    typer.echo(f"more: {notebook}")


@app.command(epilog="Example: prunelib run notebooks/own_model.ipynb build/mine.json keep=0.8 method=greedy")
def run(
    notebook: Path,
    output: Annotated[Path, typer.Argument(help="run file; the executed copy lies beside it")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="NAME=VALUE…", help="parameters of the notebook")] = None,
    quiet: Annotated[bool, typer.Option(help="what cells print goes to the executed copy alone")] = False,
) -> None:
    """Run a notebook with checked parameters."""
    from prunelib.lab import run_notebook

    code = run_notebook.main([*["--quiet"] * quiet, str(notebook), str(output), *(settings or ())])
    if code:
        raise typer.Exit(code)
    _done([output], io.from_root(output.with_suffix(".ipynb")))


@app.command(epilog="Example: prunelib score smollm2-135m-instruct --criterion simdiff_mssd --output build/scores.csv")
def score(
    model: Model,
    criterion: Annotated[str, typer.Option(help="one of `prunelib models`")] = "simdiff_mssd",
    text: Text = "pydocs:calibration",
    n_samples: Samples = 16,
    seq_len: Length = 256,
    batch_size: Batch = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="CSV file for the table")] = None,
) -> None:
    """What every layer is worth by one criterion: a table, the first to go on top."""
    import pandas as pd

    from prunelib.apps import own_model

    own_model.layer_rule(criterion)
    loaded, _, windows = _judged(model, text, n_samples, seq_len, dtype, device)
    values = own_model.importance(criterion, loaded, windows, batch_size=batch_size, progress=True)
    table = pd.DataFrame({"layer": range(len(values)), "importance": values}).sort_values("importance", kind="stable")
    typer.echo(table.to_string(index=False))
    written = [] if output is None else [io.write_text(output, table.to_csv(index=False))]
    _done(written, "notebooks/09_explorer.ipynb")


def _judged(model: str, text: str, n_samples: int, seq_len: int, dtype: str, device: str):
    """A model, its tokenizer, and the windows on which its layers are judged; what is cheap to find wrong comes first."""
    from prunelib import models
    from prunelib import text as texts
    from prunelib.lab.provenance import model_source

    corpus = texts.load(*texts.corpora.named(text))
    tokenizer = models.load_tokenizer(model_source(model))
    windows = texts.sample_windows(corpus, tokenizer, n_samples, seq_len, seed=0)
    return models.load(model_source(model), dtype=dtype, device=device), tokenizer, windows


@app.command(epilog="Example: prunelib prune smollm2-135m-instruct build/pruned --layers 4 --method greedy --gguf q8_0")
def prune(
    model: Model,
    folder: Annotated[Path, typer.Argument(help="of the checkpoint: new, empty, or of an earlier pruning")],
    layers: Annotated[int, typer.Option(help="how many decoder layers go")],
    method: Annotated[str, typer.Option(help="a search or a criterion of `prunelib models`")] = "greedy",
    text: Text = "pydocs:calibration",
    n_samples: Samples = 16,
    seq_len: Length = 256,
    batch_size: Batch = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    gguf: Gguf = [],  # noqa: B006 (typer copies it)
) -> None:
    """Remove layers and save an ordinary checkpoint.

    Beside it lie the plan, and the same removal for mergekit and llama-quantize.
    """
    from prunelib import models
    from prunelib.apps import own_model
    from prunelib.models import export
    from prunelib.models.plans import DropPlan

    own_model.check(method, "none", folder)
    dense, tokenizer, windows = _judged(model, text, n_samples, seq_len, dtype, device)
    n_layers = len(models.decoder_layers(dense))
    own_model.check_choice(method, n_layers, layers)
    for kind in gguf:
        export.check_gguf(dense.config, tokenizer, kind)
    removed = own_model.choose(method, dense, windows, layers, batch_size=batch_size, progress=True)
    typer.echo(f"{method} removes {' '.join(map(str, removed))} of {n_layers} layers")
    pruned = models.remove_layers(dense, removed)
    models.save(pruned, tokenizer, folder, overwrite=True)
    plan = DropPlan(n_layers, removed, method, {"calibration": text, "n_samples": n_samples, "seq_len": seq_len})
    typer.echo(own_model.write_exports(plan, dense.config, model, folder, pruned, tokenizer, gguf))
    _done(sorted(folder.iterdir()), "notebooks/own_model.ipynb")


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
    epilog="Example: prunelib heal build/pruned build/healed --recipe lora --set steps=64",
)
def heal(arguments: Annotated[list[str], typer.Argument(metavar="MODEL OUT [OPTION…]")]) -> None:
    """Train a pruned model back (`heal --help`). Several GPUs: `accelerate launch -m prunelib.healing`."""
    from prunelib.healing.__main__ import main

    if any(word.startswith("-") for word in arguments[:2]) and not {"-h", "--help"} & {*arguments}:
        raise ValueError(f"heal {' '.join(arguments)}: MODEL and OUT come first, then the options")
    if main(arguments):
        raise typer.Exit(2)
    _done([Path(arguments[1]) / "healed", Path(arguments[1]) / "healing.json"], "notebooks/05_healing.ipynb")


@app.command(
    epilog="Example: prunelib evaluate build/pruned --text pydocs:evaluation --task pydocs_parameter --output build/e.json"
)
def evaluate(
    model: Model,
    text: Annotated[list[str], typer.Option(help="held-out text; may be repeated")] = ["pydocs:evaluation"],  # noqa: B006
    windows: Annotated[int, typer.Option(help="windows of each text, evenly spaced")] = 64,
    seq_len: Length = 256,
    task: Annotated[list[str], typer.Option(help="task, or set of tasks, of lm-eval; may be repeated")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="the first so many items of every task")] = None,
    batch_size: Batch = 8,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option(help="JSON file for the rows")] = None,
) -> None:
    """Perplexity on texts, and accuracy on tasks."""
    import pandas as pd

    from prunelib import models
    from prunelib import text as texts
    from prunelib.apps import own_model
    from prunelib.evaluation.perplexity import PerplexityProtocol
    from prunelib.evaluation.tasks import evaluate_tasks, task_names
    from prunelib.lab.provenance import model_source

    names = task_names(task) if task else ()
    corpora = {name: texts.load(*texts.corpora.named(name)) for name in text}
    protocol = PerplexityProtocol(window=seq_len, dtype=dtype, limit=windows)
    tokenizer = models.load_tokenizer(model_source(model))
    held_out = {name: protocol.windows(one, tokenizer) for name, one in corpora.items()}
    loaded = models.load(model_source(model), dtype=dtype, device=device)
    losses = {name: protocol.measure(loaded, one, batch_size=batch_size, progress=True) for name, one in held_out.items()}
    rows = own_model.loss_rows({"model": losses})
    if names:
        bos = tokenizer.bos_token_id is not None
        answers = evaluate_tasks(loaded, tokenizer, names, bos=bos, limit=limit, batch_size=batch_size)
        rows += own_model.task_rows({"model": answers})
    typer.echo(pd.DataFrame(rows).drop(columns="state").to_string(index=False, na_rep=""))
    _done([] if output is None else [io.write_json(output, rows)], "notebooks/own_model.ipynb")


@app.command(epilog="Example: prunelib export build/pruned smollm2-135m-instruct --gguf f16")
def export(
    folder: Annotated[Path, typer.Argument(help="pruned model with its plan.json")],
    dense: Annotated[str, typer.Argument(help="the model that it was made from")],
    gguf: Gguf = [],  # noqa: B006
) -> None:
    """Files for mergekit, llama-quantize and llama.cpp, beside a pruned model."""
    from transformers import AutoConfig

    from prunelib import models
    from prunelib.apps import own_model
    from prunelib.lab.provenance import model_source
    from prunelib.models.loading import checked_source
    from prunelib.models.plans import DropPlan

    plan = DropPlan.read(folder / "plan.json")
    source, options = checked_source(model_source(dense))
    config = AutoConfig.from_pretrained(source, **options)
    final, tokenizer = models.load(folder), models.load_tokenizer(folder)
    told = own_model.write_exports(plan, config, dense, folder, final, tokenizer, gguf)
    typer.echo(told)
    files = (folder / line.partition(":")[0] for line in told.splitlines())
    _done((file for file in files if file.exists()), "docs/your_model.md")


@app.command("models")
def list_models() -> None:
    """The packaged models, and what chooses layers."""
    from prunelib.apps.own_model import SEARCHES
    from prunelib.criteria import ABLATIONS, BLOCK_CRITERIA, CRITERIA
    from prunelib.models.gguf import PACKAGED

    typer.echo("packaged models")
    for name, packaged in PACKAGED.items():
        there = (io.at_root(io.CONVERTED) / name).is_dir()
        typer.echo(f"  {name}: {packaged.license}, {'ready' if there else f'install it with `{packaged.make}`'}")
    typer.echo("searches")
    for name, (_, what) in SEARCHES.items():
        typer.echo(f"  {name}: {what}")
    for title, rules in {"layers": CRITERIA, "layers, with the model": ABLATIONS, "contiguous blocks": BLOCK_CRITERIA}.items():
        typer.echo(f"criteria of {title}")
        for name, rule in rules.items():
            typer.echo(f"  {name}: {rule.title}; {rule.source}")
    _done([], "notebooks/09_explorer.ipynb")


if __name__ == "__main__":
    app()
