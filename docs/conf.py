"""The report: `make report` builds this clone's documents, chapters and figures into pages, by Sphinx.

A chapter is shown as `make figures` executed it, or, where it was not executed, with the committed figures of its headings.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).parents[1]
EXECUTED = ROOT / "data/runs/smollm2/chapters"
HEADING = re.compile(r"^(#+) (.*?) *\(`(\w+)`\)$", re.MULTILINE)  # of a figure: its title and its stem
SEEN = re.compile(r"<!-- seen -->.*?<!-- /seen -->\n?", re.DOTALL)  # what `python -m prunelib.claims` puts below it

project = "prunelib"
extensions = ["myst_nb", "sphinx_design"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "notebooks/*.ipynb", "*.md", "data/README.md"]
exclude_patterns = [".*", "build", "data/[!R]*", "docs/claims.md", "figures", "prunelib", "tests"]
suppress_warnings = ["myst.header", "myst.xref_missing"]  # links to folders
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["colon_fence", "dollarmath"]
html_math_renderer = "mathml"  # drawn by the browser: MathJax would be loaded from elsewhere
myst_heading_anchors = 4
html_theme = "furo"
html_title = "Shallower and thinner language models"
html_copy_source = html_show_copyright = False
html_static_path = html_css_files = ["report.css"]


def made(stem):
    """How a figure was made, folded."""
    record = json.loads((ROOT / f"figures/{stem}.json").read_text(encoding="utf-8"))
    names = [f"{stem}{suffix}" for suffix in (".png", ".pdf", ".csv", ".json") if (ROOT / f"figures/{stem}{suffix}").exists()]
    files = ", ".join(f"[{name}](../figures/{name})" for name in names)
    parameters = ", ".join(f"`{name} = {value}`" for name, value in record["parameters"].items())
    return f""":::{{dropdown}} How this was made
- Command: `snakemake --cores 2 --forceall figures/{names[0]}`
- Function: `{record["function"]}`
- Runs: {", ".join(f"`{run}`" for run in record["runs"]) or "none, the published numbers alone"}
- Parameters: {parameters or "none"}
- Files: {files}
:::"""


def chapter(text, executed):
    """A notebook with a link target at the heading of every figure, and below its cell how it was made."""
    notebook, stems, cells = json.loads(text), [], []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            stems += [match[3] for match in HEADING.finditer(source)]
            source = SEEN.sub("", source) if executed else source
            cells.append(cell | {"source": HEADING.sub(r"(\3)=\n\1 \2", source)})
            continue
        tags = cell["metadata"].get("tags", [])  # of the parameters, as the runner sets them, too
        cells.append(cell | {"metadata": {"tags": ["hide-input"] if tags or "recorder" in source else []}})
        if stems:
            below = "\n\n".join(map(made, stems))
            cells.append({"id": stems[0], "cell_type": "markdown", "metadata": {}, "source": below})
            stems = []
    return json.dumps(notebook | {"cells": cells})


def first_page():
    """The claims, with links to the figures in the chapters, and the title and stem of every figure."""
    claims = (ROOT / "docs/claims.md").read_text(encoding="utf-8").partition("<!-- claims:")[2].partition("<!-- /claims")[0]
    claims = re.sub(r"\(\.\./figures/(\w+)\.\w+\)", r"(#\1)", claims.partition("-->")[2])
    figures = []
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        figures += [match.groups()[1:] for text in texts for match in HEADING.finditer(text)]
    return {"claims": claims, "figures": figures}


def prepare(app, docname, source):
    if docname == root_doc:
        source[0] = app.builder.templates.render_string(source[0], first_page())
    elif docname.startswith("notebooks/"):
        path = EXECUTED / f"{Path(docname).name}.ipynb"
        source[0] = chapter(path.read_text(encoding="utf-8") if path.exists() else source[0], path.exists())


def redirect(app, error):
    (Path(app.outdir) / "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={root_doc}.html">')


def math(block):
    """A visitor that writes a formula as MathML."""

    def visit(translator, node):
        translator.body.append(tex2mathml(node.astext(), as_block=block))
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", math(False), math(True))
    app.connect("source-read", prepare)
    app.connect("build-finished", redirect)
