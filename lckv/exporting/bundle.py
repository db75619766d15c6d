"""One module, with all of this package that it imports, as a file that needs no other.

The text of every module is taken as it is, comments and all; only what ties it to the others is left out: its imports
and the list of what it exports. As there is one name space for all, a name must mean the same in every module.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import lckv

_LINE_LENGTH = 119

_HEADER = '''\
"""{summary}

All of the model is in this file, which `lckv.export` of lckv {version} has made of the modules of that package, one
behind the other. It needs torch and transformers, and nothing of lckv.
"""

# SPDX-License-Identifier: Apache-2.0
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0

from __future__ import annotations

from transformers.utils.versions import require_version

{required}
'''


@cache
def bundle(name: str, requirements: tuple[str, ...] = ()) -> str:
    """The source text of a module of this package, self-contained.

    Args:
        name: of the module.
        requirements: what to look for before anything else is imported, such as `torch>=2.11`.

    Raises:
        ValueError: if a name means several things in these modules, or one of them imports another in a function.
    """
    parsed = {each: ast.parse(_source(each)) for each in _in_order(name)}
    _check_names(parsed)
    summary = (ast.get_docstring(parsed[name]) or "").partition("\n")[0]
    required = "".join(f'require_version("{each}")\n' for each in requirements)
    header = _HEADER.format(summary=summary, version=lckv.__version__, required=required)
    return "".join([header, *_imports(parsed.values()), *(_section(each, tree) for each, tree in parsed.items())])


def _source(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _is_ours(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == lckv.__name__


def _in_order(name: str, found: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The modules of this package that a module needs, itself last, each behind those that it imports."""
    if name in found:
        return found
    for node in ast.parse(_source(name)).body:
        if isinstance(node, ast.ImportFrom) and _is_ours(node):
            found = _in_order(str(node.module), found)
    return (*found, name)


def _check_names(parsed: dict[str, ast.Module]) -> None:
    for module, tree in parsed.items():
        if any(_is_ours(node) for node in ast.walk(tree) if node not in tree.body):
            raise ValueError(f"{module} imports from {lckv.__name__} in a function, where no name can be left out")
    meanings = {place for module, tree in parsed.items() for place in _places(module, tree)}
    if clashes := [name for name, count in Counter(name for _, name in meanings).items() if count > 1]:
        raise ValueError(f"{', '.join(clashes)}: means several things in {', '.join(parsed)}")


def _places(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The names that a module uses, each with the module where it is defined."""
    yield from _imported(tree)
    yield from ((module, name) for name in _defined(tree))


def _defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module gives to things of its own."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        else:
            names = (each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))
            yield from (each.id for each in names if each.id != "__all__")


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """What a module imports from other libraries: the module ("" for a whole one), and the name."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (("", ast.unparse(alias)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not _is_ours(node) and node.module != "__future__":
            yield from ((str(node.module), ast.unparse(alias)) for alias in node.names)


def _imports(trees: Iterable[ast.Module]) -> Iterator[str]:
    """The lines that import from other libraries."""
    names: dict[str, set[str]] = {}
    for tree in trees:
        for module, name in _imported(tree):
            names.setdefault(module, set()).add(name)
    yield from (f"import {name}\n" for name in sorted(names.pop("", ())))
    for module, imported in sorted(names.items()):
        line = f"from {module} import {', '.join(sorted(imported))}\n"
        by_line = "".join(f"    {name},\n" for name in sorted(imported))
        yield line if len(line) <= _LINE_LENGTH else f"from {module} import (\n{by_line})\n"


def _section(name: str, tree: ast.Module) -> str:
    """A module's text without imports, under a heading of its name and what it says of itself."""
    lines = _source(name).splitlines()
    for node in tree.body:
        is_docstring = node is tree.body[0] and ast.get_docstring(tree) is not None
        is_export = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        if is_docstring or is_export or isinstance(node, ast.Import | ast.ImportFrom):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    heading = [name, "", *(ast.get_docstring(tree) or "").splitlines()]
    comments = "\n".join(f"# {line}".rstrip() for line in heading)
    body = "\n".join(lines).strip("\n")
    return f"\n\n# {'-' * (_LINE_LENGTH - 2)}\n{comments}\n\n\n{body}\n"
