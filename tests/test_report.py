"""The report: Sphinx builds every chapter, figure, table and claim into pages that need no server and load nothing."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of the pages. A warning, as of a file that is not there, is an error."""
    out = tmp_path_factory.mktemp("report")
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs", ".", out], cwd=ROOT, check=True)
    return out


def test_links_lead_to_files_of_the_report_and_nothing_else_is_loaded(report):
    for page in report.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for attribute, link in re.findall(r'\b(src|href)="([^"]+)"', text):
            path = unquote(link).partition("#")[0]
            if "://" in path:
                assert attribute == "href", f"{page}: loads {path}"
            elif path:
                assert (page.parent / path.partition("?")[0]).exists(), f"{page}: {link}"


def test_every_figure_and_table_is_shown_with_its_record(report):
    shown = "".join(page.read_text(encoding="utf-8") for page in (report / "notebooks").glob("[0-9]*.html"))
    for path in (ROOT / "figures").glob("*.json"):
        assert f'id="{path.stem.replace("_", "-")}"' in shown
        assert f">figures/{path.stem}.{'csv' if '_table' in path.stem else 'png'}<" in shown, "the command"
        assert json.loads(path.read_text())["function"] in shown
    assert "<math" in shown, "formulas are drawn without a script from elsewhere"


def test_the_first_page_has_every_claim_with_its_verdict_and_every_figure(report):
    text = (report / "docs/index.html").read_text(encoding="utf-8")
    with open(ROOT / "figures/own_table_claims.csv", newline="") as file:
        claims = {line["id"]: line["verdict"] for line in csv.DictReader(file)}
    for name, verdict in claims.items():
        row = re.search(rf">{name}<.*?</(?:tr|li)>", text, re.DOTALL)[0]
        assert verdict in row or verdict == "not testable here", name
    assert all(path.name in text for path in (ROOT / "figures").glob("*.png"))
