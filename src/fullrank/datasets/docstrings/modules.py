"""Python sources read with `ast`: what each module defines, imports and exports. Nothing runs."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fullrank.datasets.docstrings.packages import Package

_SKIPPED_FOLDERS = {"tests", "test", "_vendor", "vendored", "externals", "_externals", "extern"}
"""Tests, and copies of other packages inside this one."""


@dataclass(slots=True)
class Definition:
    """A function or class with what the split and the names need to know of it."""

    module: str
    """Dotted name of the module that defines it."""
    path: str
    """Name inside the module: ``svd``, or ``KMeans.fit`` for a method."""
    doc: str = ""
    is_class: bool = False
    members: dict[str, Definition] = field(default_factory=dict)

    @property
    def qualified(self) -> str:
        """Where it is defined, e.g. ``numpy.linalg._linalg.svd``."""
        return f"{self.module}.{self.path}"


@dataclass(frozen=True, slots=True)
class Import:
    """``from module import name`` (``name`` is None for ``import module``)."""

    module: str
    name: str | None


@dataclass(slots=True)
class Module:
    """One source file."""

    name: str
    is_package: bool
    names: dict[str, Definition | Import | str] = field(default_factory=dict)
    """What its namespace binds; a string is an alias of another dotted name in it."""
    stars: list[str] = field(default_factory=list)
    """Modules whose public names are all imported."""
    exports: list[str | Import] | None = None
    """``__all__`` as far as it can be read: names, and other modules whose ``__all__`` is added.
    None when there is none or it is computed."""


def source_files(package: Package) -> Iterator[tuple[Path, str, bool]]:
    """Files of a package, in order: path, dotted module name, whether it is an ``__init__``."""
    if package.path.is_file():
        yield package.path, package.name, False
        return
    for path in sorted(package.path.rglob("*.py")):
        relative = path.relative_to(package.path)
        *folders, stem = relative.with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(folders) or _is_test(stem):
            continue
        if not all(map(str.isidentifier, [*folders, stem])):
            continue
        parts = [package.name, *folders, *([] if stem == "__init__" else [stem])]
        yield path, ".".join(parts), stem == "__init__"


def _is_test(stem: str) -> bool:
    return stem.startswith("test_") or stem.endswith("_test") or stem == "conftest"


def parse_package(package: Package) -> dict[str, Module]:
    """Modules of a package by dotted name; a file that does not parse is left out."""
    modules: dict[str, Module] = {}
    added: list[tuple[Module, list[ast.expr]]] = []
    for path, name, is_package in source_files(package):
        try:
            with warnings.catch_warnings():
                # A stray backslash in somebody else's docstring is not our user's business.
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes(), filename=str(path))
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue
        modules[name] = module = Module(name, is_package)
        reader = _Reader(module)
        reader.read(tree.body)
        reader.name_singletons()
        added += [(module, arguments) for arguments in reader.added]
    # After all modules: what is documented here may be defined in a file read later.
    for module, arguments in added:
        _add_doc(modules, module, arguments)
    return modules


class _Reader:
    """Fills in one :class:`Module`."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.added: list[list[ast.expr]] = []
        """Arguments of calls of ``add_newdoc``."""
        self.instances: dict[str, list[str]] = {}
        """Name of what is called -> names that its results are bound to."""

    def read(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    _define(self.module.names, define(node, self.module.name))
                case ast.ImportFrom():
                    self._import_from(node)
                case ast.Import():
                    for alias in node.names:
                        bound = alias.asname or alias.name.partition(".")[0]
                        target = alias.name if alias.asname else bound
                        self.module.names[bound] = Import(target, None)
                case ast.Assign(targets=[ast.Name(id=name)]):
                    self._assign(name, node.value)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    self._assign(name, value)
                case ast.AugAssign(target=ast.Name(id="__all__"), op=ast.Add()):
                    self._extend_exports(self._export_items(node.value))
                case ast.Expr(value=ast.Call() as call):
                    self._call(call)
                case ast.If() | ast.Try() | ast.With():
                    for inner in ("body", "orelse", "handlers", "finalbody"):
                        self.read(getattr(node, inner, ()))
                case ast.ExceptHandler():
                    self.read(node.body)

    def _import_from(self, node: ast.ImportFrom) -> None:
        source = node.module or ""
        if node.level:
            parts = self.module.name.split(".")
            keep = len(parts) - node.level + self.module.is_package
            source = ".".join([*parts[:keep], *([source] if source else [])])
        for alias in node.names:
            if alias.name == "*":
                self.module.stars.append(source)
            else:
                self.module.names[alias.asname or alias.name] = Import(source, alias.name)

    def _assign(self, name: str, value: ast.expr) -> None:
        if name == "__all__":
            self.module.exports = self._export_items(value)
        elif (target := dotted(value)) is not None and target != name:
            self.module.names.setdefault(name, target)
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            self.instances.setdefault(value.func.id, []).append(name)

    def name_singletons(self) -> None:
        """Let the only instance of a class made in its module name the class too.

        Users know ``scipy.stats.norm`` and ``numpy.r_``, not the classes ``norm_gen``, ``RClass``.
        """
        names = self.module.names
        for class_name, instances in self.instances.items():
            owner = names.get(class_name)
            if isinstance(owner, Definition) and owner.is_class and len(instances) == 1:
                names.setdefault(instances[0], class_name)

    def _export_items(self, value: ast.expr) -> list[str | Import] | None:
        """Read an expression over ``__all__``; None when it cannot be known without running it."""
        match value:
            case ast.List(elts=items) | ast.Tuple(elts=items):
                names = [i.value for i in items if isinstance(i, ast.Constant)]
                whole = len(names) == len(items) and all(isinstance(n, str) for n in names)
                return names if whole else None  # type: ignore[return-value]
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                first, second = self._export_items(left), self._export_items(right)
                return None if first is None or second is None else first + second
            case ast.Call(func=ast.Attribute(attr="copy", value=inner), args=[]):
                return self._export_items(inner)
            case ast.Attribute(attr="__all__", value=inner):
                source = dotted(inner)
                return None if source is None else [Import(source, "__all__")]
        return None

    def _extend_exports(self, items: list[str | Import] | None) -> None:
        if self.module.exports is not None:
            self.module.exports = None if items is None else self.module.exports + items

    def _call(self, call: ast.Call) -> None:
        match call:
            case ast.Call(
                func=ast.Attribute(attr="extend", value=ast.Name(id="__all__")), args=[x]
            ):
                self._extend_exports(self._export_items(x))
            case ast.Call(
                func=ast.Attribute(attr="append", value=ast.Name(id="__all__")), args=[x]
            ):
                self._extend_exports(self._export_items(ast.List(elts=[x])))
            case ast.Call(func=ast.Name(id="add_newdoc")):
                self.added.append(call.args)
            case ast.Call(func=ast.Name(id="_array_method_doc"), args=[name, _, doc]):
                # numpy documents the methods of arrays and scalars together.
                place = [ast.Constant("numpy._core.multiarray"), ast.Constant("ndarray")]
                self.added.append([*place, ast.Tuple(elts=[name, doc])])


def define(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, module: str, prefix: str = ""
) -> Definition:
    """Read a function, or a class with its methods and inner classes."""
    found = Definition(module, prefix + node.name, ast.get_docstring(node) or "")
    if isinstance(node, ast.ClassDef):
        found.is_class = True
        for inner in node.body:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                _define(found.members, define(inner, module, f"{found.path}."))
    return found


def _define(
    names: dict[str, Definition | Import | str] | dict[str, Definition], new: Definition
) -> None:
    """Bind a definition; a later one without a docstring (setter, overload) replaces none."""
    name = new.path.rpartition(".")[2]
    old = names.get(name)
    if not (isinstance(old, Definition) and old.doc and not new.doc):
        names[name] = new


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of an expression that is nothing but names and attributes."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attr):
            head = dotted(value)
            return None if head is None else f"{head}.{attr}"
    return None


def _add_doc(modules: dict[str, Module], module: Module, arguments: list[ast.expr]) -> None:
    """Read numpy's way to document what is written in C.

    ``add_newdoc(place, name, doc)`` where ``doc`` is a text, a pair (member, text) or a list of
    such pairs; or ``add_newdoc(name, doc)``, which belongs to the package of the file.
    """
    match arguments:
        case [ast.Constant(value=str(place)), ast.Constant(value=str(name)), content, *_]:
            pass
        case [ast.Constant(value=str(name)), content]:
            place = module.name.rpartition(".")[0]
        case _:
            return
    if place.partition(".")[0] != module.name.partition(".")[0] or not name.isidentifier():
        return
    pairs = content.elts if isinstance(content, ast.List) else [content]
    for pair in pairs:
        member = ""
        if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
            member, pair = _text(pair.elts[0]), pair.elts[1]
        if doc := inspect.cleandoc(_text(pair)):
            _attach(modules, place, name, member, doc)


def _attach(modules: dict[str, Module], place: str, name: str, member: str, doc: str) -> None:
    home = modules.setdefault(place, Module(place, is_package=False))
    owner = home.names.get(name)
    if not isinstance(owner, Definition):
        home.names[name] = owner = Definition(place, name)
    target = owner
    if member:
        target = owner.members.setdefault(member, Definition(owner.module, f"{name}.{member}"))
    target.doc = target.doc or doc


def _text(node: ast.expr) -> str:
    """Value of a string, whatever is then done to it (``"...".replace(...)``, ``"..." % ...``)."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Call(func=ast.Attribute(value=inner)) | ast.BinOp(left=inner):
            return _text(inner)
    return ""
