"""The embedded corpora: what is read, how it is split, and that it is what the manifest says."""

import json
from importlib.util import spec_from_file_location

import pytest

from prunelib.io import project_root
from prunelib.text import embedded as pydocs
from prunelib.text.embedded import Document, split_of, without_near_duplicates


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A made-up installed package."""
    folder = tmp_path / "seaborn"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""Package docstring."""\n')
    (folder / "module.py").write_text(
        '"""Module."""\nimport definitely_not_installed_anywhere\n'
        "# First line of a paragraph,\n# second line of it.\n\n# A lone comment.\n"
        'class A:\n    """Class."""\n    if True:\n        def method(self):\n'
        '            """Method.\n\n            Indented."""\n            return "# not a comment\\n# nor this"\n'
    )
    (folder / "tests" / "test_a.py").write_text('"""Never read."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = spec_from_file_location("seaborn", folder / "__init__.py", submodule_search_locations=[str(folder)])
    monkeypatch.setattr(pydocs, "find_spec", lambda name: spec)
    return "seaborn"


def test_docstrings_and_comments_are_read_without_importing_the_package(package):
    assert {document.name: document.text for document in pydocs._docstrings([package])} == {
        "seaborn/__init__.py:": "Package docstring.",
        "seaborn/module.py:": "Module.",
        "seaborn/module.py:A": "Class.",
        "seaborn/module.py:A.method": "Method.\n\nIndented.",
    }
    assert {document.name: document.text for document in pydocs._comments([package])} == {
        "seaborn/module.py:3": "First line of a paragraph,\nsecond line of it.",
        "seaborn/module.py:6": "A lone comment.",
    }


def test_near_duplicates_go_and_the_first_stays():
    words = [f"word{i}" for i in range(200)]
    near = [*words[:195], "changed", *words[196:]]
    other = [f"other{i}" for i in range(200)]
    kept = without_near_duplicates([Document(n, " ".join(w)) for n, w in [("a", words), ("b", near), ("c", other)]])
    assert [document.name for document in kept] == ["a", "c"]


def test_the_split_depends_on_the_name_alone_and_has_the_stated_shares():
    splits = [split_of("pydocs", f"numpy/a.py:f{i}") for i in range(4000)]
    assert 0.77 < splits.count("train") / 4000 < 0.83
    assert 0.08 < splits.count("evaluation") / 4000 < 0.12
    assert {split_of("pyreadmes", f"package{i}") for i in range(100)} == {"calibration", "evaluation"}


@pytest.mark.slow
@pytest.mark.parametrize("corpus", pydocs.EMBEDDED)
def test_the_installed_packages_give_the_text_of_the_manifest(corpus):
    manifest = json.loads(pydocs.manifest_path().read_text())[corpus]
    assert pydocs.describe(corpus) == manifest


def test_a_package_that_the_lock_gains_changes_no_corpus():
    lines = (project_root() / "requirements.lock").read_text().splitlines()
    locked = {line.split("==")[0].strip() for line in lines if "==" in line and not line.startswith("#")}
    assert set(json.loads(pydocs.manifest_path().read_text())["pyreadmes"]["packages"]) < locked


def test_corpora_without_a_train_split_say_so():
    with pytest.raises(ValueError, match="pyreadmes has no train split"):
        pydocs.records("pyreadmes", "train")
    with pytest.raises(ValueError, match="unknown split 'test' of pydocs: choose one of train, calibration, evaluation"):
        pydocs.records("pydocs", "test")
    with pytest.raises(ValueError, match="unknown embedded corpus 'docs'"):
        pydocs.records("docs", "train")
