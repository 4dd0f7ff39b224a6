"""Reading sources: packages, names, See Also sections."""

import importlib

import pytest
from docs_library import FILES, write_distribution, write_package

from fullrank.core import InputError
from fullrank.datasets.docstrings.corpus import read_packages
from fullrank.datasets.docstrings.modules import parse_package
from fullrank.datasets.docstrings.names import Names
from fullrank.datasets.docstrings.packages import default_packages, every_package, find_packages
from fullrank.datasets.docstrings.see_also import plain, split_docstring


@pytest.fixture
def library(tmp_path, monkeypatch):
    write_package(tmp_path, "fakelib", FILES)
    write_distribution(tmp_path, "fake-lib", "fakelib", "1.2.3")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


@pytest.fixture
def documents(library):
    return {d.title: d for d in read_packages(find_packages(["fakelib"]))}


class TestPackages:
    def test_by_distribution_and_by_import_name(self, library):
        (package,) = find_packages(["fake-lib"])
        assert package == ("fakelib", "1.2.3", library / "fakelib")
        assert find_packages(["fakelib", "fake-lib"]) == [package]

    def test_single_module_without_metadata(self, library):
        (library / "lonely_module.py").write_text('def f():\n    """Alone."""\n')
        (package,) = find_packages(["lonely_module"])
        assert package == ("lonely_module", "", library / "lonely_module.py")
        assert [d.title for d in read_packages([package])] == ["lonely_module.f"]

    @pytest.mark.parametrize("name", ["no-such-package", "", "sys", "a/b"])
    def test_absent_or_without_sources(self, name):
        with pytest.raises(InputError, match="with Python sources is installed"):
            find_packages([name])

    def test_every_package_has_ours_and_numpy(self, library):
        names = [p.name for p in every_package()]
        assert {"fakelib", "numpy"} <= set(names)
        assert names == sorted(names)

    def test_default_packages(self, monkeypatch):
        assert default_packages()[0].name == "numpy"
        monkeypatch.setattr(
            "fullrank.datasets.docstrings.packages.DEFAULT_PACKAGES", ("no-such-package",)
        )
        with pytest.raises(InputError, match="none of the packages no-such-package is installed"):
            default_packages()


class TestDocuments:
    def test_titles_are_public_names_once_each(self, documents):
        assert sorted(documents) == [
            "fakelib.Matrix",
            "fakelib.Matrix.sum",
            "fakelib.Matrix.transpose",
            "fakelib.invert",
            "fakelib.latin.cafe",
            "fakelib.quick_sum",
            "fakelib.shapes.Circle",
            "fakelib.shapes.Circle.area",
            "fakelib.shapes.Circle.reduce",
            "fakelib.shapes.Square",
            "fakelib.shapes.Square.area",
            "fakelib.shapes.Square.reduce",
            "fakelib.shapes.unit",
            "fakelib.shift",
            "fakelib.solve",
            "fakelib.solvers.helper",
            "fakelib.thing",
            "fakelib.ufuncs.add",
            "fakelib.ufuncs.add.reduce_all",
        ]

    def test_text_is_dedented_and_without_the_section(self, documents):
        document = documents["fakelib.solve"]
        assert document.parts.text == (
            "Solve a linear system of equations.\n\nNotes about it stand here.\n\n"
            "Notes\n-----\nUses elimination."
        )
        assert document.parts.summary == "Solve a linear system of equations."
        assert document.module == "fakelib.solvers"
        assert documents["fakelib.thing"].parts.summary == "A thing documented like one in C."
        assert documents["fakelib.latin.cafe"].parts.text == "Caf\xe9 au lait for all."

    def test_related_documents(self, documents):
        related = {title: d.related for title, d in documents.items() if d.related}
        assert related == {
            # Through the package's own names, roles and methods; what is private or absent drops.
            "fakelib.quick_sum": ("fakelib.Matrix.sum", "fakelib.shapes.Square", "fakelib.solve"),
            # The class's own member first, an absolute name, never itself.
            "fakelib.Matrix.sum": ("fakelib.Matrix.transpose", "fakelib.quick_sum"),
            "fakelib.solve": ("fakelib.invert", "fakelib.solvers.helper"),
            "fakelib.shapes.Square": ("fakelib.shapes.Circle",),
            "fakelib.shapes.Circle.area": ("fakelib.shapes.Square",),
            "fakelib.thing": ("fakelib.quick_sum",),
            "fakelib.ufuncs.add": ("fakelib.quick_sum",),
        }

    def test_ambiguous_names_mean_nothing(self, library):
        (package,) = find_packages(["fakelib"])
        names = Names("fakelib", parse_package(package))
        matrix = names.lookup("fakelib", "Matrix")
        # Matrix names `reduce`: a method of Square and of Circle.
        assert split_docstring(matrix.doc).references == ("reduce",)
        assert names.resolve("reduce", matrix) is None
        assert names.resolve("Circle.reduce", matrix).qualified == "fakelib.shapes.Circle.reduce"
        assert names.resolve("cafe", matrix).qualified == "fakelib.latin.cafe"


def test_packages_above_the_definition_name_it_first(tmp_path):
    files = {
        "__init__.py": "",
        "a/__init__.py": "from ..interpolate._impl import Spline\n",
        "interpolate/__init__.py": "from ._impl import *\n",
        "interpolate/_impl.py": '__all__ = ["Spline"]\nclass Spline:\n    """A curve."""\n',
        "loop.py": "from .loop import missing\nfrom .pool import *\n",
        "pool.py": "from .loop import *\n",
    }
    write_package(tmp_path, "pack", files)
    package = find_packages(["numpy"])[0]._replace(name="pack", path=tmp_path / "pack")
    names = Names("pack", parse_package(package))
    assert names.public["pack.interpolate._impl.Spline"] == "pack.interpolate.Spline"
    assert names.lookup("pack", "loop.missing") is None
    assert names.lookup("pack", "a.Spline") is names.lookup("pack", "interpolate._impl.Spline")


class TestSeeAlso:
    @pytest.mark.parametrize(
        ("section", "references"),
        [
            ("mean : Average.\n    Over several\n    lines.", ("mean",)),
            ("mean, median, a.b.mode", ("mean", "median", "a.b.mode")),
            ("mean, median,\nmode", ("mean", "median", "mode")),
            ("mean, median,\n    mode : Three.", ("mean", "median", "mode")),
            (":func:`mean` : x\n:class:`~a.B`", ("mean", "a.B")),
            ("`mean`\n``median``", ("mean", "median")),
            ("mean: Average.", ("mean",)),
            ("mean\n    Average.\n\nmedian\n    Middle.", ("mean", "median")),
            ("mean(), median.", ("mean", "median")),
            ("mean - average", ("mean",)),
            ("    mean : indented\n        twice\n    median", ("mean", "median")),
            ("The user guide on averages.\nmean", ("mean",)),
            (":ref:`averages <the-averages>`", ()),
            ("mean\nmean", ("mean",)),
            ("", ()),
        ],
    )
    def test_references(self, section, references):
        parts = split_docstring(f"S.\n\nSee Also\n--------\n{section}\n\nNotes\n-----\nN.")
        assert parts.references == references
        assert parts.text == "S.\n\nNotes\n-----\nN."

    def test_directive_and_underlines(self):
        parts = split_docstring("S.\n\n.. seealso::\n\n    mean\n\nNotes\n=====\nN.")
        assert (parts.references, parts.text) == (("mean",), "S.\n\nNotes\n=====\nN.")
        assert split_docstring("S.\n\nSee also\n========\nmean").references == ("mean",)
        assert split_docstring("See also the mean.\n\nMore.").text == "See also the mean.\n\nMore."

    @pytest.mark.parametrize(
        ("doc", "summary"),
        [
            ("Sum of\nall values.\n\nMore.", "Sum of all values."),
            ("sum(a, b=(1, 2))\n\nSum.", "Sum."),
            ("out = sum(a, *,\n          b)\n\nSum.", "Sum."),
            ("sum(a) -> int\n\nSum.", "Sum."),
            (".. deprecated:: 1.0\n    Use x.\n\nSum.", "Sum."),
            ("Sum.\nNotes\n-----\nMore.", "Sum."),
            ("Notes\n-----\nMore.", ""),
            ("%(before)s\n\nSum.\n\n%(after)s", "Sum."),
            ("sum(a)", ""),
            ("", ""),
        ],
    )
    def test_summary(self, doc, summary):
        assert split_docstring(doc).summary == summary

    def test_plain(self):
        assert plain("See `x`, ``y`` and :meth:`~a.z` of `G`_.") == "See x, y and a.z of G."
