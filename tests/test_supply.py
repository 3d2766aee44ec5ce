"""What goes in: every file with its source and licence, every package in the inventory, nothing that could run code."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath

import pandas as pd
import pytest
import torch
import yaml

from prunelib import models
from prunelib.healing import train as healing
from prunelib.lab import checksums, supply
from prunelib.text import corpora

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def as_locked():
    if supply.not_as_locked():
        pytest.skip("the inventory reads the metadata of the locked packages, and others are installed here")


# --------------------------------------------------------------------------------------------------------------- files


def rows(path: Path) -> list[list[str]]:
    """The rows of all tables of a Markdown page, header and ruler left out."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [cells for cells in found if not re.fullmatch(r"[-:| ]+", "".join(cells))]


def covered(path: str, name: str) -> bool:
    """A row speaks of a file by its name, of all that is in a folder, or of all whose names end so."""
    return path == name or (name.endswith("/") and path.startswith(name)) or (name[0] == "*" and path.endswith(name[1:]))


def test_every_file_of_data_has_its_source_and_licence():
    table = {cells[0].strip("`"): cells for cells in rows(ROOT / "data" / "README.md") if cells[0].startswith("`")}
    paths = [str(PurePosixPath(path).relative_to("data")) for path in [*checksums.read(), checksums.SUMS]]
    speaking = {path: [name for name in table if covered(path, name)] for path in paths}
    assert {path: names for path, names in speaking.items() if len(names) != 1} == {}
    empty = {name for name, cells in table.items() if len(cells) != 4 or not all(cells)}
    assert empty == set(), "what it is, what made it, licence"
    unused = {name for name in table if not any(name in names for names in speaking.values())}
    assert unused == {"runs/"}, "what the batch writes, not in git"


def test_every_published_number_has_its_source():
    said = {key: cells[1] for cells in rows(ROOT / "data/published/README.md") for key in re.findall(r"`(\w+)`", cells[0])}
    keys = set(pd.read_csv(ROOT / "data/published/published.csv")["paper"])
    assert keys <= said.keys()
    identified = re.compile(r"arXiv \d{4}\.\d{5}|\b[\w-]+/[\w-]+\b|second hand")
    assert [key for key in sorted(keys) if not identified.search(said[key])] == []
    files = {path.name for path in (ROOT / "data/published").iterdir()} - {"README.md"}
    assert files <= {name for cells in rows(ROOT / "data/published/README.md") for name in re.findall(r"`([^`]+)`", cells[0])}


def test_every_published_plan_names_its_source():
    for path in (ROOT / "data/plans").glob("*.json"):
        assert re.search(r"arXiv \d{4}\.\d{5}", json.loads(path.read_text())["settings"]["source"]), path.name


# ------------------------------------------------------------------------------------------------------------ inventory


def test_the_inventory_names_exactly_the_locked_packages():
    content = json.loads((ROOT / supply.SBOM).read_text())
    assert (content["bomFormat"], content["specVersion"]) == ("CycloneDX", "1.6")
    assert {part["name"]: part["version"] for part in content["components"]} == supply.locked()
    assert len(content["components"]) == len(supply.locked())
    for part in content["components"]:
        assert part["purl"] == f"pkg:pypi/{part['name']}@{part['version']}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    about = content["metadata"]["component"]
    assert (about["name"], about["version"]) == (project["name"], project["version"])
    references = {about["bom-ref"], *(part["bom-ref"] for part in content["components"])}
    (root,) = content["dependencies"]
    assert {root["ref"], *root["dependsOn"]} <= references


def test_the_inventory_is_the_same_each_time_and_the_committed_one(as_locked):
    assert supply.sbom() == supply.sbom()
    assert "serialNumber" not in supply.sbom()
    assert "timestamp" not in supply.sbom()
    assert supply.outdated() == []


def test_licences_are_in_the_words_of_spdx_where_that_is_certain(monkeypatch):
    said = {
        "a": {"License-Expression": "MIT AND PSF-2.0", "License": "MIT"},
        "b": {"License": "Apache 2.0"},
        "c": {"License": "Copyright (c) 2001\nAll rights reserved", "Classifier": ["License :: OSI Approved :: MIT License"]},
        "d": {"License": "BSD", "Classifier": ["Topic :: Text", "License :: OSI Approved :: BSD License"]},
        "e": {"License": "UNKNOWN"},
        "f": {"Classifier": ["License :: OSI Approved :: BSD License", "License :: OSI Approved :: Apache Software License"]},
    }

    class Metadata(dict):
        def __getitem__(self, key):
            return self.get(key)

        def get_all(self, key):
            return self.get(key)

    monkeypatch.setattr(supply.metadata, "metadata", lambda name: Metadata(said[name]))
    assert [supply.licence(name) for name in said] == [
        "MIT AND PSF-2.0",
        "Apache-2.0",
        "MIT",
        "BSD License",
        None,
        "BSD License or Apache Software License",
    ]


def test_another_version_than_the_locked_one_stops_the_inventory(monkeypatch):
    monkeypatch.setattr(supply, "installed_version", lambda name: "0" if name == "numpy" else supply.locked()[name])
    with pytest.raises(RuntimeError, match=r"numpy is 0, requirements.lock says \d"):
        supply.sbom()


# ------------------------------------------------------------------------------------------------------- known weaknesses

REPORT = {
    "dependencies": [
        {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}]},
        {"name": "b", "version": "3", "vulns": [{"id": "GHSA-2", "aliases": [], "fix_versions": []}]},
        {"name": "c", "version": "4", "vulns": []},
    ]
}


def test_a_weakness_is_named_with_its_remedy_and_passes_only_with_a_reason():
    new, known, unseen = supply.weaknesses(REPORT, {"CVE-1": "another text in the corpora"})
    assert new == ["b 3: GHSA-2, fixed in none yet"]
    assert known == ["a 1: PYSEC-1, fixed in 2: another text in the corpora"]
    assert unseen == []


def test_a_reason_without_its_weakness_is_reported():
    new, known, _ = supply.weaknesses({"dependencies": REPORT["dependencies"][2:]}, {"CVE-1": "why"})
    assert new == ["CVE-1 is accepted in pyproject.toml, but is not found any more"]
    assert known == []


def test_packages_that_were_not_looked_up_are_no_all_clear():
    report = {"dependencies": [{"name": "a", "skip_reason": "not found on PyPI"}, *REPORT["dependencies"][2:]]}
    assert supply.weaknesses(report, {"CVE-1": "why"}) == ([], [], ["a"])


@pytest.mark.parametrize(
    ("report", "ends", "said"),
    [
        (json.dumps({"dependencies": REPORT["dependencies"][2:]}), supply.COMPLETE, "no known weakness"),
        (json.dumps(REPORT), supply.FOUND, "FAILS  a known weakness: b 3: GHSA-2"),
        (json.dumps({"dependencies": [{"name": "a", "skip_reason": "?"}]}), supply.UNKNOWN, "could not be looked up (a"),
        ("", supply.UNKNOWN, "pip-audit gave no report: ConnectionError"),
    ],
)
def test_how_an_audit_ends(report, ends, said, tmp_path, monkeypatch, capsys):
    """A tool that says what pip-audit would: nothing here reaches a network."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "installed").touch()
    (tmp_path / "report").write_text(report)
    script = f"""#!/bin/sh
case "$*" in *pip_audit*) echo ConnectionError >&2; cat {tmp_path}/report;; esac
"""
    (tmp_path / "bin" / "python").write_text(script)
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(supply, "AUDIT_TOOLS", str(tmp_path))
    monkeypatch.setattr(supply, "local_checks", dict)
    assert supply.main([]) == ends
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_an_audit_without_its_tools_says_that_nothing_was_looked_up(tmp_path, monkeypatch, capsys):
    (tmp_path / "lock").write_text("no-such-file-anywhere @ file:///no/such/file.whl\n")
    monkeypatch.setattr(supply, "AUDIT_TOOLS", str(tmp_path / "tools"))
    monkeypatch.setattr(supply, "TOOLS_LOCK", str(tmp_path / "lock"))
    monkeypatch.setattr(supply, "local_checks", lambda: {"files": ["data/x was altered"]})
    assert supply.main([]) == supply.FOUND, "what is known to be wrong comes first"
    shown = capsys.readouterr()
    assert "could not be installed, nothing was looked up" in shown.err
    assert "FAILS  files\n       data/x was altered" in shown.out
    assert supply.main(["--local"]) == supply.FOUND


def test_the_tools_of_the_audit_are_pinned():
    lines = [line for line in (ROOT / supply.TOOLS_LOCK).read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert {"pip-audit", "cyclonedx-python-lib"} <= {line.partition("==")[0] for line in lines}


def test_every_accepted_weakness_has_a_reason():
    assert all(len(reason) > 20 for reason in supply.accepted().values())


# ------------------------------------------------------------------------------------------------------------ no pickle


def test_no_source_unpickles_evaluates_or_trusts():
    assert supply.unjudged() == []


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "import pickle"),
        ("from cloudpickle import load", "from cloudpickle import"),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("import torch as t\nt.load(f)", "torch.load"),
        ("from torch import load as fetch\nfetch(f)", "torch.load"),
        ("import pandas as pd\npd.read_pickle(f)", "pandas.read_pickle"),
        ("import yaml\nyaml.load(f)", "yaml.load"),
        ("def f(x):\n    return eval(x)", "eval"),
        ("M.from_pretrained(x, trust_remote_code=True)", "trust_remote_code=True"),
        ("load(x, weights_only=flag)", "weights_only=flag"),
        ("AutoModelForCausalLM.from_pretrained(x)", "AutoModelForCausalLM.from_pretrained without use_safetensors=True"),
    ],
)
def test_the_search_finds_each_way_in(source, what):
    assert what in [use.what for use in supply.uses(source, "f.py")]


def test_the_search_lets_ordinary_code_pass():
    source = """
import re, numpy as np, yaml
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(x, use_safetensors=True, trust_remote_code=False).eval()
config = AutoConfig.from_pretrained(x)
pattern, table, settings = re.compile("a"), np.load(f), yaml.safe_load(f)
"""
    assert list(supply.uses(source, "f.py")) == []


def test_a_pickled_checkpoint_is_refused_before_it_is_opened(tiny_llama, tmp_path):
    """torch.save's format executes what it is told to: the file here would make a folder."""
    folder = tmp_path / "model"
    models.save(tiny_llama, None, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(S'" + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(
        models.CheckpointError, match=r"pytorch_model\.bin is pickled and is not read: convert it to safetensors"
    ):
        models.load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["windows.pt", "texts.pkl", "texts.npy", "texts.jsonl.pkl"])
def test_a_pickled_corpus_is_refused_with_what_can_be_read(tmp_path, name):
    torch.save({"text": ["a"]}, tmp_path / name)
    with pytest.raises(ValueError, match=r"or a file \.txt, \.raw, \.jsonl"):
        corpora.load(tmp_path / name)


def test_a_folder_with_pickled_data_alone_holds_no_copy_of_a_data_set(tmp_path):
    for name in ("train.pt", "train.pkl", "wiki.train.pkl"):
        torch.save({"text": ["a"]}, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no offline copy of 'wikitext2' \(train\).*train\.jsonl"):
        corpora.load("wikitext2", "train", data_dir=tmp_path)


def test_a_pickled_adapter_is_refused(tiny_llama, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "base.json").write_text(json.dumps(healing.fingerprint(tiny_llama)))
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(healing.HealingError, match=r"no adapter_model\.safetensors .* pickled weights are not read"):
        healing.load_adapter(tiny_llama, tmp_path)


def test_loading_pruning_saving_and_measuring_unpickles_nothing(tiny_llama, tmp_path):
    """Python reports every name that an unpickler looks up; none may come on the way of a checkpoint and its statistics."""
    models.save(tiny_llama, None, tmp_path / "model")
    script = """
import sys
import torch
from prunelib import models
from prunelib.criteria.similarity import CRITERIA
from prunelib.criteria.statistics import LayerStats, collect

seen = []
sys.addaudithook(lambda event, arguments: seen.append(arguments) if event == "pickle.find_class" else None)
torch.load = lambda *arguments, **keywords: seen.append(arguments)
model = models.load(sys.argv[1])
collect(model, torch.arange(64).view(2, 32)).save(sys.argv[2] + "/stats.safetensors", {})
again = LayerStats.load(sys.argv[2] + "/stats.safetensors")
importance = CRITERIA["block_influence"](again)
models.save(models.remove_layers(model, (int(importance.argmin()),)), None, sys.argv[2] + "/pruned")
models.load(sys.argv[2] + "/pruned")
print(seen)
"""
    command = [sys.executable, "-c", script, tmp_path / "model", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------------------- archive


def test_zenodo_and_citation_say_the_same():
    deposit = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert deposit["upload_type"] == citation["type"] == "software"
    for field in ("title", "version", "license", "keywords"):
        assert deposit[field] == citation[field], field
    assert deposit["description"] == citation["abstract"]
    names = [author.get("name") or f"{author['family-names']}, {author['given-names']}" for author in citation["authors"]]
    assert [creator["name"] for creator in deposit["creators"]] == names
    papers = {reference["notes"] for reference in citation["references"]}
    assert {related["identifier"] for related in deposit["related_identifiers"]} == papers
    assert {related["relation"] for related in deposit["related_identifiers"]} == {"references"}
    assert all(re.fullmatch(r"arXiv:\d{4}\.\d{5}", paper) for paper in papers)
    # What Zenodo's schema knows; a name it does not know makes the whole file count for nothing.
    known = {"title", "upload_type", "description", "creators", "version", "license", "access_right", "language", "keywords"}
    assert deposit.keys() == known | {"related_identifiers"}
