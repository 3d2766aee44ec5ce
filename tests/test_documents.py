"""What is written in several places says the same: the lock, the notebooks, the figures."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from prunelib.figures import save as figures
from prunelib.lab import profile
from prunelib.lab import run_notebook as notebook
from prunelib.lab.provenance import code_cells

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = sorted(path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
COMPUTING = ("00_quickstart", "09_explorer")  # chapters that run a model themselves
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_lock_pins_every_dependency_once_and_within_its_range():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    versions = dict(line.split("==") for line in lines)
    assert len(lines) == len(versions), "no package twice"
    for text in sum(PROJECT["optional-dependencies"].values(), PROJECT["dependencies"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonical(requirement.name)]), text
    assert not [line for line in lines if "+" in line], "without the local version of one machine's wheel"
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {"pip": ["-r requirements.lock", "-e ."]} in conda, "conda takes the versions of the lock"


def test_citation_and_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (str(citation["version"]), citation["license"]) == (PROJECT["version"], PROJECT["license"]["text"])


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook: its parameters cell, unread parameters, kernel, outputs, execution counts."""
    content = json.loads(path.read_text(encoding="utf-8"))
    found = []
    try:
        known = notebook.parameters(path)
        found += [f"`{name}` has no help" for name, parameter in known.items() if not parameter.help]
        found += [] if "output" in known else ["no parameter `output`"]
        later = "\n".join(source for source, _ in code_cells(path)[1:])
        unread = [name for name in known if not re.search(rf"\b{name}\b", later)]
        found += [f"`{name}` is never read" for name in unread if name != "output" and "recorder.parameters" not in later]
    except notebook.ParameterError as error:
        found.append(str(error))
    if content["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if any(cell.get("outputs") or cell.get("execution_count") for cell in content["cells"]):
        found.append("outputs are not stripped")
    if "papermill" in content["metadata"]:
        found.append("an executed copy was committed")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    assert faults(path) == []


@pytest.mark.parametrize("path", [path for path in CHAPTERS if path.stem not in COMPUTING], ids=lambda path: path.stem)
def test_chapters_read_results_and_do_not_compute(path):
    code = "\n".join(source for source, _ in code_cells(path))
    imported = {".".join(name.split(".")[:2]) for name in re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE)}
    allowed = {"IPython.display", "prunelib.figures", "prunelib.lab", "prunelib.claims"}
    assert imported <= allowed, "what a chapter computes is in prunelib/figures"


def words(path: Path) -> str:
    """The Markdown of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_have_a_question_three_answers_a_next_and_limits(path):
    text = words(path)
    top, _, rest = text.partition("\n## ")
    assert re.match(r"# .+\n\n\*\*[^*]+\?\*\*", top)
    assert top.count("\n- ") == 3
    assert "Next: " in top
    assert "### What this cannot say" in rest
    assert "**Example.**" in rest or path.stem in ("08_claims", *COMPUTING)


def test_headings_registry_and_files_name_the_same_figures():
    """A chapter's heading names the stem, the default profile runs the chapter, the committed files are those stems."""
    default = yaml.safe_load((ROOT / "profiles/smollm2.yaml").read_text())
    assert sorted(default["chapters"]) == [path.stem for path in CHAPTERS]
    shown = {stem: path.stem for path in CHAPTERS for stem in figures.figure_stems(path)}
    assert {stem: entry.chapter for stem, entry in figures.registry().items()} == shown
    promised = {f"{stem}{suffix}" for stem in shown for suffix in figures.figure_suffixes(stem)}
    kept = {path.name for path in (ROOT / default["figures"]).glob("[!.]*") if path.suffix != ".pdf"}
    assert kept == {name for name in promised if not name.endswith(".pdf")}


def test_parameters_of_chapters_are_those_of_the_default_profile():
    default = profile.read(yaml.safe_load((ROOT / "profiles/smollm2.yaml").read_text()))
    for path in CHAPTERS:
        written = {name: one.default for name, one in notebook.parameters(path).items() if name != "output"}
        assert written == profile.chapter_values(default, path.stem), path.stem


def test_commands_of_the_documents_have_parameters_that_their_notebooks_know():
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    commands = re.findall(r"python -m prunelib\.lab\.run_notebook (\S+) (\S+) ((?:.|\\\n)*?)(?=\n[^ ]|\n```|$)", texts)
    assert len(commands) > 3
    for path, _, rest in commands:
        words = shlex.split(rest.replace("\\\n", " "), comments=True)
        values = dict(word.split("=", 1) for word in words if "=" in word)
        assert notebook.check(ROOT / path, values).keys() >= values.keys()


def test_links_and_modules_of_the_documents_exist():
    for document in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")),
        *(ROOT / "docs").glob("*.md"),
        *NOTEBOOKS,
    ]:
        text = words(document) if document.suffix == ".ipynb" else document.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            known = link.startswith("http") or not {".", "/"} & set(link) or (document.parent / link).exists()
            assert known, (document.name, link)
        for module in re.findall(r"python -m (prunelib[\w.]*)", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (document.name, module)
