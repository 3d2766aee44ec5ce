"""What is written in several places says the same: the lock, the notebooks, the figures."""

import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import pandas
import pytest
import yaml
from architectures import ARCHITECTURES
from batch_project import CHAPTER, write_notebook

from prunelib.figures import style as figures
from prunelib.lab import profile as grid
from prunelib.lab import run_notebook as notebook

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted((ROOT / "notebooks" / "experiments").glob("*.ipynb"))
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
TOOLS = sorted(set((ROOT / "notebooks").glob("*.ipynb")) - set(CHAPTERS))
NOTEBOOKS = CHAPTERS + EXPERIMENTS + TOOLS
COMPUTING = ("00_quickstart", "09_explorer")  # chapters that run a model themselves


def pinned() -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / "requirements.lock").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ------------------------------------------------------------------------------------------------------------ versions


def test_conda_environment_holds_the_same_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-r requirements.lock", "-e ."], "the versions are those of the lock, then this package"
    assert {name.partition("=")[0] for name in conda} == {"python", "pip"}, "no second list of versions"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (python,) = [item.partition("=")[2] for item in conda if item.startswith("python=")]
    assert tuple(map(int, python.split("."))) >= tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))


def test_lock_pins_every_dependency_once_and_within_its_range():
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    versions = pinned()
    assert len(lines) == len(versions), "no package twice"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in sum(project["optional-dependencies"].values(), project["dependencies"]):
        requirement = Requirement(text)
        assert canonical(requirement.name) in versions, text
        assert requirement.specifier.contains(versions[canonical(requirement.name)]), text
    assert versions["torch"] == "2.13.0", "without the local version of one machine's wheel"
    assert not [line for line in lines if "+" in line or "@" in line or "--" in line]


def test_makefile_has_the_promised_targets():
    text = (ROOT / "Makefile").read_text()
    for target in ("figures", "test", "verify", "hashes", "audit", "sbom", "report", "lab", "walkthrough", "clean", "lock"):
        assert re.search(rf"^{target}:", text, re.MULTILINE), target
    for target in ("figures", "test", "verify", "hashes", "audit", "sbom", "report", "lab", "lock"):
        assert re.search(rf"^{target}: \$\(READY\)$", text, re.MULTILINE), f"{target} makes and reuses the environment"
    assert re.search("^walkthrough:$", text, re.MULTILINE), "it times how the environment is made"
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_citation_and_package_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == project["version"]
    assert citation["license"] == project["license"]["text"] == "MIT"
    assert citation["title"].startswith(project["name"])
    assert citation["authors"]


# ----------------------------------------------------------------------------------------------------------- notebooks


def faults(path: Path) -> list[str]:
    """What is wrong with a notebook: its parameters cell, unread parameters, kernel, outputs, execution counts."""
    content = json.loads(path.read_text(encoding="utf-8"))
    found = []
    try:
        known = notebook.parameters(path)
        found += [f"`{name}` has no help" for name, parameter in known.items() if not parameter.help]
        found += [] if "output" in known else ["no parameter `output`"]
        found += [f"`{name}` is never read" for name in notebook.unread(path)]
    except notebook.ParameterError as error:
        found.append(str(error))
    if content["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if any(cell.get("outputs") or cell.get("execution_count") for cell in content["cells"]):
        found.append("outputs are not stripped")
    if "papermill" in content["metadata"]:
        found.append("an executed copy was committed")
    return found


def imports(path: Path) -> set[str]:
    """Packages that a notebook imports."""
    names = set()
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse(notebook._without_magics("".join(cell["source"])))):
                if isinstance(node, ast.Import):
                    names |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    assert faults(path) == []


@pytest.mark.parametrize("path", [path for path in CHAPTERS if path.stem not in COMPUTING], ids=lambda path: path.stem)
def test_chapters_read_results_and_do_not_compute(path):
    light = {"prunelib.lab.runs", "prunelib.figures.style", "prunelib.lab.provenance", "prunelib.claims.claims"}
    used = imports(path)
    heavy = {name for name in used if name.split(".")[0] in ("torch", "transformers")}
    ours = {name for name in used if name.startswith("prunelib.")}
    assert not heavy
    assert {".".join(name.split(".")[:2]) for name in ours} <= light


def test_the_check_of_notebooks_finds_faults(tmp_path):
    good = write_notebook(tmp_path / "good.ipynb", CHAPTER)
    assert faults(good) == []
    content = json.loads(good.read_text())
    content["metadata"] = {"kernelspec": {"name": ".venv"}, "papermill": {}}
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    code[0]["source"] = 'unused = 1\nresults = "r.csv"  # table\nfigures = "f"  # folder\noutput = "x"  # result'
    code[1]["outputs"] = [{"output_type": "stream"}]
    bad = tmp_path / "bad.ipynb"
    bad.write_text(json.dumps(content))
    assert faults(bad) == [
        "`unused` has no help",
        "`unused` is never read",
        "the kernel is not python3",
        "outputs are not stripped",
        "an executed copy was committed",
    ]
    heavy = write_notebook(
        tmp_path / "heavy.ipynb", {"parameters": "a = 1", "x": "import torch.nn\nfrom prunelib import models"}
    )
    assert imports(heavy) == {"torch.nn", "prunelib", "prunelib.models"}


# ------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.skipif(not CHAPTERS, reason="no chapter yet")
def test_headings_profile_and_files_name_the_same_figures():
    """A chapter's heading names the stem, the reference profile runs the chapter, the committed files are those stems."""
    profile = yaml.safe_load((ROOT / "profiles" / "reference.yaml").read_text())
    assert sorted(profile["chapters"]) == [path.stem for path in CHAPTERS]
    promised = {
        f"{stem}{suffix}" for path in CHAPTERS for stem in grid.figure_stems(str(path)) for suffix in grid.figure_suffixes(stem)
    }
    assert promised, "no heading names a figure"
    assert {path.name for path in (ROOT / profile["figures"]).iterdir()} == promised


# --------------------------------------------------------------------------------------------------------------- README


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_everything_the_readme_links_to_is_there():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#:]+)\)", prose)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_figure_of_the_readme_is_drawn_by_a_chapter():
    shown = {Path(link).stem for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)}
    assert shown <= {stem for path in CHAPTERS for stem in grid.figure_stems(str(path))}


def test_the_numbers_of_the_readme_are_those_of_the_committed_table(tables_as_committed):
    table = figures.markdown(pandas.read_csv(ROOT / "figures/own_table_what_held.csv"))
    assert table in README, f"replace the table under «In numbers» by:\n{table}"


def test_the_readme_counts_the_tested_architectures():
    assert f"tested on {len(ARCHITECTURES)} architecture variants" in README


def test_commands_of_the_readme_have_parameters_that_their_notebooks_know():
    """Checked by the runner itself, without running anything."""
    commands = re.findall(r"python -m prunelib\.notebook (\S+) (\S+) ((?:.|\\\n)*?)(?=\n[^ ]|\n```|$)", README)
    assert len(commands) >= 3
    for path, _, rest in commands:
        words = shlex.split(rest.replace("\\\n", " "), comments=True)
        values = dict(word.split("=", 1) for word in words if "=" in word)
        assert values
        assert notebook.check(ROOT / path, values, text=True).keys() >= values.keys()


def test_commands_of_the_readme_say_how_many_cores_snakemake_may_use():
    commands = re.findall(r"snakemake (?:-\S+|[^`\n#])*", README)
    assert [command for command in commands if " -n" not in f" {command}" and "--cores" not in command] == []
    assert any("--cores" in command for command in commands)


def test_options_that_the_documents_name_exist():
    """`python -m prunelib.<module> --option` in any README is an option that the module's source knows."""
    named = 0
    for document in [ROOT / "README.md", *sorted((ROOT / "data").rglob("README.md"))]:
        for module, option in re.findall(r"python -m prunelib\.(\w+)[^`\n]*? (--[\w-]+)", document.read_text(encoding="utf-8")):
            assert f'"{option}"' in (ROOT / "prunelib" / f"{module}.py").read_text(encoding="utf-8"), (
                document.name,
                module,
                option,
            )
            named += 1
    assert named >= 2
