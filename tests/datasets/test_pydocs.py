"""The built-in corpus, on a package made up for it and on numpy."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from docs_library import FILES, write_package

from fullrank.core import InputError
from fullrank.datasets import pydocs
from fullrank.datasets.docstrings.duplicates import near_identical


def many(first, count, see):
    """Functions, each with a summary of its own and a See Also section."""
    return "".join(
        f'def {first}{i}():\n    """Compute item {i} of the series {first}.\n\n    See Also\n'
        f'    --------\n    {see(i)}\n    """\n'
        for i in range(count)
    )


@pytest.fixture
def install(tmp_path, monkeypatch):
    def install(name, files):
        write_package(tmp_path, name, files)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return name

    return install


def test_rules_on_a_made_up_package(install):
    data = pydocs([install("fakelib", FILES)])
    # Circle.area repeats the summary of Square.area; Matrix names only an ambiguous method.
    # quick_sum is tied to all the others: cutting their one component leaves it nothing.
    assert set(data.queries) == {
        "fakelib.Matrix.sum",
        "fakelib.shapes.Square",
        "fakelib.solve",
        "fakelib.thing",
        "fakelib.ufuncs.add",
    }
    assert data.queries["fakelib.ufuncs.add"] == "Add arguments one by one."
    assert data.exclude["fakelib.solve"] == ("fakelib.solve",)
    assert data.clusters["fakelib.solve"] == "fakelib.solvers"
    assert data.corpus["fakelib.solve"].metadata == {
        "package": "fakelib",
        "module": "fakelib.solvers",
    }
    assert "fakelib" not in sys.modules


def test_near_copies_stay_together_and_are_excluded(install):
    words = " ".join(f"word{i}" for i in range(60))
    text = f'"""Sort {{}} values.\n\n    {words}\n\n    See Also\n    --------\n    {{}}\n    """'
    files = {
        "__init__.py": "",
        "a.py": f"def sort():\n    {text.format('the', 'b.sort, b.other')}\n",
        "b.py": f"def sort():\n    {text.format('these', 'other')}\n"
        'def other():\n    """Something else entirely."""\n',
        "c.py": many("f", 20, lambda i: f"f{i ^ 1}"),
    }
    data = pydocs([install("twins", files)])
    assert data.qrels["twins.a.sort"] == {"twins.b.other": 1}
    assert set(data.exclude["twins.a.sort"]) == {"twins.a.sort", "twins.b.sort"}
    parts = {part for part, queries in data.parts.items() for q in queries if "sort" in q}
    assert len(parts) == 1


def test_size_keeps_what_is_judged(install):
    files = {
        "__init__.py": "",
        "a.py": many("f", 10, lambda i: f"f{i ^ 1}"),
        "b.py": "".join(f'def g{i}():\n    """Document number {i}."""\n' for i in range(50)),
    }
    name = install("sized", files)
    small, large = pydocs([name], size=12), pydocs([name], size=40)
    assert len(small.corpus) == 12
    assert len(large.corpus) == 40
    assert {f"sized.a.f{i}" for i in range(10)} <= set(small.corpus.ids)
    assert len(pydocs([name], size=5).corpus) == 10
    assert len(pydocs([name], size=None).corpus) == 60
    assert pydocs([name], size=12, seed=1).corpus.ids != small.corpus.ids
    assert pydocs([name], size=12).corpus.fingerprint == small.corpus.fingerprint


def test_judgements_that_cross_parts_are_dropped_and_counted(install):
    # One component: a ring of ten groups of four functions that name each other.
    def see(i):
        group = [f"f{i - i % 4 + k}" for k in range(4) if k != i % 4]
        return ", ".join([*group, f"f{(i + 4) % 40}"] if i % 4 == 0 else group)

    data = pydocs([install("ring", {"__init__.py": "", "a.py": many("f", 40, see)})])
    part = {q: name for name, queries in data.parts.items() for q in queries}
    assert data.manifest["judgements_dropped_between_parts"] > 0
    assert data.manifest["judgements"] + data.manifest["judgements_dropped_between_parts"] == 130
    assert all(part[d] == part[q] for q, judged in data.qrels.items() for d in judged)
    assert all(data.parts.values())


def test_bad_arguments(install):
    with pytest.raises(InputError, match="leave out packages="):
        pydocs(["numpy"], every=True)
    with pytest.raises(InputError, match="leave out packages="):
        pydocs(every=True, quick=True)
    with pytest.raises(InputError, match="expected a list of names"):
        pydocs("numpy")
    with pytest.raises(InputError, match="expected a list of names"):
        pydocs([])
    with pytest.raises(InputError, match="positive number"):
        pydocs(["numpy"], size=0)
    with pytest.raises(InputError, match="'no-such-package'"):
        pydocs(["numpy", "no-such-package"])
    with pytest.raises(InputError, match="no docstrings in silent"):
        pydocs([install("silent", {"__init__.py": "x = 1\n"})])


@pytest.fixture(scope="module")
def numpy_docs():
    return pydocs(["numpy"])


@pytest.fixture(scope="module")
def quick_docs():
    return pydocs(["numpy"], quick=True)


@pytest.fixture(params=["numpy_docs", "quick_docs"])
def real(request):
    return request.getfixturevalue(request.param)


class TestOnNumpy:
    def test_known_documents(self, numpy_docs):
        corpus = numpy_docs.corpus
        assert "numpy.linalg.svd" in corpus
        assert corpus["numpy.linalg.svd"].metadata["module"].startswith("numpy.linalg.")
        assert "numpy.asarray" in corpus  # documented for C
        assert numpy_docs.qrels["numpy.linalg.eigvals"]["numpy.linalg.eig"] == 1
        assert len(numpy_docs.queries) > 400

    def test_parts_share_nothing(self, real):
        part = {q: name for name, queries in real.parts.items() for q in queries}
        assert set(part) == set(real.queries) == set(real.qrels)
        assert len(part) == sum(map(len, real.parts.values()))
        home = dict(part)
        for query, judged in real.qrels.items():
            for document in judged:
                # Neither a pair's reverse nor the document itself is in another part.
                assert home.setdefault(document, part[query]) == part[query]
        texts = [real.queries[q].lower() for q in part]
        assert len(set(texts)) == len(texts)
        ids = real.corpus.ids
        for a, b in near_identical(real.corpus.texts):
            assert home.get(ids[a]) == home.get(ids[b]) or None in (
                home.get(ids[a]),
                home.get(ids[b]),
            )

    def test_own_documents_are_excluded_and_never_judged(self, real):
        for query, judged in real.qrels.items():
            assert judged
            assert set(judged.values()) == {1}
            assert query in real.exclude[query]
            assert not set(judged) & set(real.exclude[query])
            assert set(judged) <= set(real.corpus.ids)
            assert set(real.exclude[query]) <= set(real.corpus.ids)

    def test_documents_hold_no_see_also_section(self, real):
        assert not any("\nSee Also\n----" in text for text in real.corpus.texts)

    def test_shares_and_manifest(self, real):
        total = len(real.queries)
        shares = {part: len(queries) / total for part, queries in real.parts.items()}
        assert shares == pytest.approx({"train": 0.30, "dev": 0.25, "test": 0.45}, abs=0.06)
        manifest = json.loads(json.dumps(real.manifest))
        assert manifest["packages"] == {"numpy": importlib.metadata.version("numpy")}
        assert manifest["queries"] == total
        assert manifest["documents"] == len(real.corpus)
        assert manifest["sha256"] == real.corpus.fingerprint

    def test_quick_is_small(self, quick_docs):
        assert len(quick_docs.corpus) == 300
        assert len(quick_docs.queries) >= 60
        assert quick_docs.manifest["judgements_dropped_between_parts"] == 0

    def test_the_same_in_every_process(self, numpy_docs):
        script = (
            "from fullrank.datasets import pydocs; d = pydocs(['numpy']); "
            "print(d.corpus.fingerprint, d.parts)"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "7"}
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment
        )
        assert result.stdout.strip() == f"{numpy_docs.corpus.fingerprint} {numpy_docs.parts}"
