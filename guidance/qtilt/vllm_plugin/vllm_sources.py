"""What a source tree of vLLM defines, read without importing it. Imports neither torch nor vllm.

So a version that can't run here can be read, and one that lacks something says so before an import of it fails.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Found(NamedTuple):
    """The statement that binds a name, and the module it stands in."""

    module: str
    node: ast.AST


class VllmSources:
    """root: the folder ``vllm`` itself."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parsed: dict[str, list[ast.stmt]] = {}

    @property
    def version(self) -> str:
        """As the build wrote it down; ``unknown`` for a tree that was never built."""
        for statement in self._statements("vllm._version"):
            if isinstance(statement, ast.Assign) and "__version__" in _names(statement):
                return str(ast.literal_eval(statement.value))
        return "unknown"

    def find(self, module: str, name: str) -> Found | None:
        """What binds ``name`` in the module or, behind a dot, what binds the rest in the class or function before it.

        A class binds what its body and its bases bind, and what its methods assign to attributes of ``self``; a
        function binds the attributes that it assigns to of anything. Imports inside vLLM are followed.
        """
        owner, _, attribute = name.partition(".")
        found = self._bound(module, owner)
        if found is None or not attribute:
            return found
        if isinstance(found.node, ast.ClassDef):
            return self._member(found, attribute)
        return _assigned(found, attribute)

    def parameters(self, module: str, name: str) -> ast.arguments | None:
        """Of a function or method, ``self`` included; of a class, its constructor's. None if there is no such thing."""
        found = self.find(module, name)
        if found is not None and isinstance(found.node, ast.ClassDef):
            found = self.find(module, f"{name}.__init__")
        return found.node.args if found is not None and isinstance(found.node, Function) else None

    def _bound(self, module: str, name: str) -> Found | None:
        for statement in self._statements(module):
            if not isinstance(statement, ast.ImportFrom):
                if name in _names(statement):
                    return Found(module, statement)
                continue
            origin = self._origin(module, statement)
            for alias in statement.names:
                if alias.name == "*" or (alias.asname or alias.name) == name:
                    found = self._bound(origin, name if alias.name == "*" else alias.name)
                    if found is not None:
                        return found
        return None

    def _member(self, owner: Found, name: str) -> Found | None:
        assert isinstance(owner.node, ast.ClassDef)
        for statement in _flat(owner.node.body):
            if name in _names(statement):
                return Found(owner.module, statement)
        if (assigned := _assigned(owner, name, of="self")) is not None:
            return assigned
        for base in owner.node.bases:
            parent = self._bound(owner.module, base.id) if isinstance(base, ast.Name) else None
            if parent is not None and isinstance(parent.node, ast.ClassDef):
                inherited = self._member(parent, name)
                if inherited is not None:
                    return inherited
        return None

    def _origin(self, module: str, statement: ast.ImportFrom) -> str:
        """The module that is imported from, its name in full."""
        if not statement.level:
            return statement.module or ""
        file, parts = self._file(module), module.split(".")
        is_package = file is not None and file.name == "__init__.py"
        package = parts[: len(parts) - statement.level + is_package]
        return ".".join([*package, *([statement.module] if statement.module else [])])

    def _statements(self, module: str) -> list[ast.stmt]:
        """Those of the module that may bind names; none if it isn't there."""
        if module not in self._parsed:
            file = self._file(module)
            body = [] if file is None else ast.parse(file.read_text(encoding="utf-8")).body
            self._parsed[module] = list(_flat(body))
        return self._parsed[module]

    def _file(self, module: str) -> Path | None:
        top, *parts = module.split(".")
        if top != "vllm":
            return None
        path = self._root.joinpath(*parts)
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _flat(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements, and those below an ``if`` or a ``try``."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _flat([*statement.body, *statement.orelse])
        if isinstance(statement, ast.Try):
            yield from _flat(inner for handler in statement.handlers for inner in handler.body)


def _names(statement: ast.stmt) -> set[str]:
    """What a statement binds, imports aside."""
    match statement:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return {statement.name}
        case ast.Assign():
            return {target.id for target in statement.targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case _:
            return set()


def _assigned(owner: Found, attribute: str, of: str | None = None) -> Found | None:
    """Where inside the owner ``of.attribute = …`` stands; of: None for anything."""
    for node in ast.walk(owner.node):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = [part for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Attribute)]
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            if not isinstance(target, ast.Attribute) or target.attr != attribute:
                continue
            if of is None or (isinstance(target.value, ast.Name) and target.value.id == of):
                return Found(owner.module, node)
    return None


def signature_of(text: str) -> tuple[str, ast.arguments]:
    """``Class.method(self, first, *, second)`` as the name and its parameters."""
    name, _, parameters = text.partition("(")
    function = ast.parse(f"def _({parameters}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return name, function.args


def can_be_called(found: ast.arguments, passed: ast.arguments) -> bool:
    """Whether a function takes what is passed, by place and behind ``*`` by keyword, and needs nothing else."""
    places, wanted = _parameters(found.posonlyargs + found.args), _parameters(passed.args)
    keywords = _parameters(passed.kwonlyargs)
    known = {*places[len(wanted) :], *_parameters(found.kwonlyargs)}
    optional = {*places[len(places) - len(found.defaults) :]}
    optional |= {each.arg for each, default in zip(found.kwonlyargs, found.kw_defaults, strict=True) if default}
    return (
        places[: len(wanted)] == wanted
        and (found.kwarg is not None or known.issuperset(keywords))
        and (known - optional).issubset(keywords)
    )


def takes_exactly(found: ast.arguments, expected: ast.arguments) -> bool:
    """Whether whoever calls the one may call the other: the same parameters in the same places."""
    theirs, ours = (
        (_parameters(each.posonlyargs + each.args), _parameters(each.kwonlyargs), each.vararg, each.kwarg)
        for each in (found, expected)
    )
    return theirs == ours


def _parameters(arguments: list[ast.arg]) -> list[str]:
    return [argument.arg for argument in arguments]
