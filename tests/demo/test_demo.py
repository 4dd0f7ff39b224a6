"""The main job on a small corpus, by the command line, and what can be done with its folder."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from fullrank.cli.main import main
from fullrank.core.errors import StoreError
from fullrank.demo import DemoConfig, run_demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def run(*arguments):
    sys.argv = ["fullrank", *map(str, arguments)]
    with pytest.raises(SystemExit) as stopped:
        main()
    return stopped.value.code or 0


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of a quick demo of 200 documents, made by the command line.

    In a process of its own: the peak of memory that it reports is that of all its process did.
    """
    folder = tmp_path_factory.mktemp("with space") / "demo"
    command = ["demo", "--quick", "--size", "200", "--out", str(folder)]
    subprocess.run([sys.executable, "-m", "fullrank", *command], check=True)
    return folder


def test_everything_is_there(demo):
    for name in ("report.html", "xray.html", "results.json", "plan.json", "index/manifest.json"):
        assert (demo / name).is_file(), name
    results = json.loads((demo / "results.json").read_text())
    assert results["corpus"]["documents"] == 200
    rows = {r["system"]: r for r in results["comparison"]["rows"] if r["metric"] == "nDCG@10"}
    assert {"BM25", "dense (base)", "rrf (base)", "dense (tuned)", "dense (shrunk)"} <= set(rows)
    assert all(0 < r["mean"] <= 1 for r in rows.values())
    assert results["training"]["memory"]["peak_bytes"] > 0
    curve = results["floor"]["curve"]
    assert len(curve) == 2
    assert all(c["holds"] == (c["lower"] >= 0.8) for c in curve)
    sizes = {e["name"]: e for e in results["encoders"]}
    assert sizes["shrunk"]["linear_parameters"] < sizes["tuned"]["linear_parameters"]
    assert sizes["shrunk"]["disk_bytes"] < sizes["tuned"]["disk_bytes"]
    assert results["peak_resident_bytes"] < 3 * 2**30


def test_the_report_needs_nothing_from_elsewhere(demo):
    page = (demo / "report.html").read_text()
    for section in ("results", "train", "see", "shrink", "queries", "about"):
        assert f'id="{section}"' in page
    assert page.count("<svg") >= 5
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="https?://', page)


def test_the_folder_serves_the_other_commands(demo, capsys):
    index, query = demo / "index", "solve a linear system"
    capsys.readouterr()
    for system in ("bm25", "dense:tuned", "weighted:shrunk", "feedback:tuned"):
        assert run("order", "search", index, query, "--system", system) == 0
    assert "numpy" in capsys.readouterr().out
    assert run("see", "model", demo / "models" / "shrunk") == 0


def test_a_second_run_takes_embeddings_and_weights_from_the_cache(demo):
    first = json.loads((demo / "results.json").read_text())
    again = run_demo(DemoConfig.small(demo, size=200), progress=False, say=lambda _: None)
    assert first["from_cache"] < again.from_cache
    rows = json.loads(again.comparison.to_json())["rows"]
    assert rows == first["comparison"]["rows"]
    assert [c.value for c in again.shrinking.found.curve]


def test_the_folder_can_be_moved(demo, tmp_path):
    from fullrank.retrieval import Index

    shutil.copytree(demo, tmp_path / "moved")
    index = Index.open(tmp_path / "moved" / "index")
    model = index.encoders["tuned"].model
    assert str(tmp_path / "moved") in str(model.resolve())
    assert len(index.search("matrix rank", system="dense:tuned")["q"]) == 10


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(StoreError, match="holds no demo"):
        run_demo(DemoConfig.small(tmp_path), progress=False, say=lambda _: None)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
