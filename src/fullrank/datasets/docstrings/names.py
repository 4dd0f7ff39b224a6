"""Which public name a definition goes by, and which definition a written name means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from fullrank.datasets.docstrings.modules import Definition, Import, Module

Found = Definition | Module


class Names:
    """The names of one top-level package, followed through imports without running any.

    Parameters
    ----------
    package
        Name of the top-level package.
    modules
        Its modules by dotted name.
    """

    def __init__(self, package: str, modules: dict[str, Module]) -> None:
        self.package = package
        self.modules = modules
        self.public: dict[str, str] = {}
        """Qualified name of a definition -> the public name it goes by."""
        self._suffixes: dict[str, dict[str, Definition]] = defaultdict(dict)
        self._collect()

    # -- from names to definitions -----------------------------------------------------------

    def lookup(self, module: str, name: str) -> Found | None:
        """What a dotted ``name`` means inside a module, or None."""
        found: Found | None = self.modules.get(module)
        for part in name.split("."):
            if isinstance(found, Module):
                found = self._in_module(found, part, set())
            elif isinstance(found, Definition):
                found = found.members.get(part)
        return found

    def _in_module(self, module: Module, name: str, seen: set[tuple[str, str]]) -> Found | None:
        """One name in a module's namespace, through imports; circular ones end at None."""
        if (module.name, name) in seen:
            return None
        seen.add((module.name, name))
        bound = module.names.get(name)
        found: Found | None = None
        if isinstance(bound, Definition):
            return bound
        if isinstance(bound, Import):
            found = self._imported(bound, seen)
        elif isinstance(bound, str):
            head, *rest = bound.split(".")
            found = self._in_module(module, head, seen)
            for part in rest:
                found = self._member(found, part, seen)
        for star in reversed(module.stars):
            if found is not None or name.startswith("_"):
                break
            found = self._imported(Import(star, name), seen)
        # A submodule is the weakest: a name imported from it usually hides it.
        return found or self.modules.get(f"{module.name}.{name}")

    def _imported(self, bound: Import, seen: set[tuple[str, str]]) -> Found | None:
        module = self.modules.get(bound.module)
        if module is None or bound.name is None:
            return module
        return self._in_module(module, bound.name, seen)

    def _member(self, owner: Found | None, name: str, seen: set[tuple[str, str]]) -> Found | None:
        if isinstance(owner, Module):
            return self._in_module(owner, name, seen)
        return owner.members.get(name) if owner is not None else None

    # -- from definitions to names -----------------------------------------------------------

    def _collect(self) -> None:
        """Name every definition: by its best public alias, else by where it is defined.

        Packages above the defining module come first (``scipy.interpolate.BSpline``, though
        ``scipy.stats`` imports it too), then what is shorter.
        """
        aliases: dict[str, tuple[bool, int, int, str]] = {}
        for module in self.modules.values():
            if any(part.startswith("_") for part in module.name.split(".")):
                continue
            for name in self.exported(module):
                found = self._in_module(module, name, set())
                if isinstance(found, Definition):
                    alias = f"{module.name}.{name}"
                    foreign = not f"{found.module}.".startswith(f"{module.name}.")
                    key = (foreign, alias.count("."), len(alias), alias)
                    aliases[found.qualified] = min(aliases.get(found.qualified, key), key)
                    self._index(alias, found)
        for definition in self.definitions():
            best = aliases.get(definition.qualified)
            self._name(definition, best[-1] if best else definition.qualified)

    def _name(self, definition: Definition, alias: str) -> None:
        self.public[definition.qualified] = alias
        self._index(alias, definition)
        for name, member in definition.members.items():
            self._name(member, f"{alias}.{name}")

    def _index(self, alias: str, definition: Definition) -> None:
        self._suffixes[alias.rpartition(".")[2]].setdefault(alias, definition)

    def definitions(self) -> Iterator[Definition]:
        """Functions and classes at the top of the modules, in order of module and file."""
        for name in sorted(self.modules):
            for bound in self.modules[name].names.values():
                if isinstance(bound, Definition):
                    yield bound

    def exported(self, module: Module) -> list[str]:
        """Public names that a module offers: ``__all__``, or what its kind offers without one.

        Without a readable ``__all__`` a package offers what it imports (that is what its
        ``__init__`` is for), a plain module only what it defines.
        """
        names = self._all(module, set())
        if names is None:
            names = self._unlisted(module, set(), imports=module.is_package)
        return sorted({n for n in names if not n.startswith("_")})

    def _all(self, module: Module, seen: set[str]) -> set[str] | None:
        if module.exports is None or module.name in seen:
            return None
        seen.add(module.name)
        names: set[str] = set()
        for item in module.exports:
            if isinstance(item, str):
                names.add(item)
                continue
            source = self.lookup(module.name, item.module)
            more = self._all(source, seen) if isinstance(source, Module) else None
            if more is None:
                return None
            names |= more
        return names

    def _unlisted(self, module: Module, seen: set[str], imports: bool) -> set[str]:
        if module.name in seen:
            return set()
        seen.add(module.name)
        names = {n for n, b in module.names.items() if imports or not isinstance(b, Import)}
        for star in module.stars if imports else ():
            source = self.modules.get(star)
            if source is not None:
                listed = self._all(source, set())
                names |= self._unlisted(source, seen, True) if listed is None else listed
        return names

    # -- what a See Also section means -------------------------------------------------------

    def resolve(self, name: str, document: Definition) -> Definition | None:
        """The definition that a name in a document's See Also section stands for.

        Tried in this order: the document's own class and module, the module it is published in
        and those above it, the name as an absolute one, and the only public name that ends so.
        A name that could mean several things means none.
        """
        for scope, relative in self._scopes(name, document):
            found = self.lookup(scope, relative)
            if isinstance(found, Definition):
                return found
        endings = self._suffixes.get(name.rpartition(".")[2], {})
        matches = {
            d.qualified: d for a, d in endings.items() if a == name or a.endswith(f".{name}")
        }
        return next(iter(matches.values())) if len(matches) == 1 else None

    def _scopes(self, name: str, document: Definition) -> Iterator[tuple[str, str]]:
        owner = document.path.rpartition(".")[0]
        if owner:
            yield document.module, f"{owner}.{name}"
        yield document.module, name
        published = self.public.get(document.qualified, document.qualified)
        parts = published.split(".")[:-1]
        while parts:
            if (scope := ".".join(parts)) in self.modules:
                yield scope, name
            parts.pop()
        if document.members:
            yield document.module, f"{document.path}.{name}"
        if name.startswith(f"{self.package}."):
            yield self.package, name.removeprefix(f"{self.package}.")
