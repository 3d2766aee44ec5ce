"""Which package may import which, and what an import drags in (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "prunelib"
SCIENCE = {"models", "text", "evaluation", "criteria", "depth", "slicing", "healing", "speed", "scale"}
MAY_IMPORT = {
    "io": set(),
    "models": {"io"},
    "text": {"io"},
    "evaluation": {"io", "models", "text"},
    "criteria": {"io", "models", "text", "evaluation"},
    "depth": {"io", "models", "text", "evaluation", "criteria"},
    "slicing": {"io", "models", "text", "evaluation", "criteria"},
    "healing": {"io", "models", "text"},
    "speed": {"io", "models", "text", "slicing", "evaluation"},
    "scale": {"io", "models", "text", "criteria", "evaluation"},
    "lab": {"io"},
    "figures": {"io", "lab", "claims"},
    "claims": {"io", "lab"},
    "apps": {*SCIENCE, "io", "lab", "figures", "claims"},
    "__init__": {"slicing"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def wing(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way_and_no_private_name_crosses_a_package(path):
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    wrong = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom) and node.module == "prunelib":
            modules = [f"prunelib.{name}" for name in names]
        else:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
        for module in (name for name in modules if name.split(".")[0] == "prunelib"):
            if wing(module) != here and wing(module) not in MAY_IMPORT[here]:
                wrong.append(f"line {node.lineno}: {here} may not import {module}")
            if wing(module) != here and any(name.startswith("_") for name in names):
                wrong.append(f"line {node.lineno}: a private name of {module}")
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_functions_and_classes_are_short(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    limits = {ast.FunctionDef: 70, ast.AsyncFunctionDef: 70, ast.ClassDef: 150}
    lengths = [
        (node.name, node.end_lineno - node.lineno + 1, limits[type(node)]) for node in ast.walk(tree) if type(node) in limits
    ]
    assert [f"{name}: {length} lines" for name, length, limit in lengths if length > limit] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("imported", "kept_out"),
    [
        ("prunelib.models", ("papermill", "pandas", "matplotlib")),
        ("prunelib.lab.runs, prunelib.lab.profile, prunelib.lab.run_notebook", ("torch", "papermill", "matplotlib")),
        ("prunelib.figures.save; prunelib.figures.save.registry()", ("torch", "papermill")),
    ],
)
def test_an_import_is_light(imported, kept_out):
    code = f"import {imported}; import sys; print([name for name in {kept_out} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
