"""A small package on disk that has everything `pydocs` must cope with."""

import textwrap

FILES = {
    "__init__.py": '''
        """The package."""
        raise RuntimeError("imported, not parsed")
        from .solvers import *
        from ._core import fast_sum as quick_sum, Matrix
        from . import solvers, shapes
        try:
            from ._core import thing
        except ImportError:
            thing = None
        sum_of_everything = quick_sum
    ''',
    "_core.py": '''
        from . import shapes
        def fast_sum(values):
            """Sum all the values quickly.

            See Also
            --------
            Matrix.sum : The method.
            solvers.solve, :func:`~fakelib.shapes.Square`
            nothing_like_it : Not there.
            _hidden
            """
        def _hidden():
            """Private helper of the sum."""
        def thing():
            """
            thing(a, b, /) -> c

            A thing documented like one in C.

            See Also
            --------
            quick_sum
            """
        class Matrix:
            """A rectangular table of numbers.

            See Also
            --------
            reduce
            """
            def sum(self):
                """Sum the elements of this matrix.

                See Also
                --------
                transpose, fakelib.quick_sum
                sum : Itself.
                """
            @property
            def transpose(self):
                """Rows and columns exchanged."""
            @transpose.setter
            def transpose(self, value):
                pass
            def _secret(self):
                """Not for users."""
            def undocumented(self):
                pass
    ''',
    "solvers.py": '''
        __all__ = ["solve"]
        __all__ += ["invert"]
        def solve(a, b):
            """Solve a linear system of equations.

            Notes about it stand here.

            See Also
            --------
            invert : Other way,
                with a description that names reduce
            helper : Not exported, found in the module.

            Notes
            -----
            Uses elimination.
            """
        def invert(a):
            """Invert a square matrix."""
        def helper(a):
            """Help to solve things, not exported by name."""
    ''',
    "shapes.py": '''
        class Square:
            """A square with four equal sides.

            See Also
            --------
            Circle
            """
            def area(self):
                """Area of the shape."""
            def reduce(self):
                """Make the square smaller."""
        class Circle:
            """A circle of a given radius."""
            def area(self):
                """Area of the shape.

                See Also
                --------
                Square
                """
            def reduce(self):
                """Make the circle smaller."""
        class _unit_type:
            """The shape of size one, of which there is one."""
        unit = _unit_type()
    ''',
    "ufuncs.py": """
        from ._added import *
    """,
    "_added.py": '''
        add_newdoc("fakelib.ufuncs", "add", """
            add(x, y)

            Add arguments one by one.

            See Also
            --------
            quick_sum
            """)
        add_newdoc("fakelib.ufuncs", "add", ("reduce_all", "Reduce with %s." % "addition"))
        add_newdoc("shift", """Shift the bits of a number.""")
        add_newdoc("elsewhere.module", "other", """Another package's business.""")
    ''',
    "broken.py": "def half(:\n",
    "latin.py": "# -*- coding: latin-1 -*-\ndef cafe():\n    'Caf\xe9 au lait for all.'\n",
    "tests/__init__.py": "",
    "tests/test_core.py": 'def test_it():\n    """A test of it."""\n',
    "_vendor/other.py": 'def other():\n    """Somebody else\'s."""\n',
}


def write_package(root, name, files):
    """Write sources under ``root/name``; their text is dedented."""
    for path, text in files.items():
        file = root / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(textwrap.dedent(text).encode("latin-1"))


def write_distribution(root, distribution, name, version):
    """Write the metadata by which an installed package is found."""
    folder = root / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )
    (folder / "RECORD").write_text(f"{name}/__init__.py,,\n{name}/_core.py,,\n")
