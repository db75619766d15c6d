"""What the site has beside the pages in `docs/`; mkdocs.yml names this file in `hooks` and `extensions`.

Its first page is the README, two more are CONTRIBUTING and CHANGELOG, and the page of all keys is made of the
dataclasses in `lckv.config`. In docstrings, names in brackets and backticks lead to what they name.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the package of this checkout, whatever is installed

from lckv.commands.hydra_store import SCHEMAS  # noqa: E402
from lckv.config.keys import keys_of  # noqa: E402

OUTSIDE = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages whose text lies outside of `docs/`, where one looks for it without a site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are no files in `docs/`."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "keys.md", content="\n".join(keys_page())))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lets links that are right in the repository be right in the site."""
    markdown = markdown.replace("](docs/", "](")
    if page.file.src_uri == "study/README.md":
        markdown = markdown.replace("](report.md)", "](report.html)")
    markdown = re.sub(r"\]\(\.\./(CONTRIBUTING|CHANGELOG)\.md", r"](\1.md", markdown)
    return re.sub(r"\[([^][]+)\]\((?:\.\./)?(?:LICENSE|notebooks/|lckv/|scripts/)[^)]*\)", r"\1", markdown)


def keys_page() -> Iterator[str]:
    """The lines of the page with all keys of all commands."""
    yield from ("# Keys", "")
    yield (
        "What `KEY=VALUE` may be on each command line. This page is made of the dataclasses in `lckv/config/`, which "
        "own every key's type and default; the YAML files in `conf/` only choose among their values, so that a preset "
        "such as `model=tiny` has others: `python -m lckv.train --help` prints those that its command line gives."
    )
    groups: dict[type, tuple[str, str]] = {}
    yield from ("", "## Commands")
    for command, schema in SCHEMAS.items():
        base = next((name for name, other in SCHEMAS.items() if other in schema.__mro__[1:]), None)
        known = {name for name in keys_of(SCHEMAS[base])} if base else set()
        own = {name: key for name, key in keys_of(schema).items() if "." not in name and name not in known}
        yield from ("", f"### `lckv.{command}`", "", summary(schema), "")
        inside = {name: key.type for name, key in own.items() if key.is_group}
        groups |= {kind: (name, command) for name, kind in inside.items() if kind not in groups}
        links = [f"[`{name}`](#{kind.__name__})" for name, kind in inside.items()]
        links += [f"all of [`lckv.{base}`](#lckv{base})"] if base else []
        yield f"Groups: {', '.join(links)}." if links else ""
        yield from table(schema, [name for name, key in own.items() if not key.is_group])
    yield from ("", "## Groups")
    for kind, (name, command) in sorted(groups.items(), key=lambda item: item[1]):
        is_alone = [each for each, _ in groups.values()].count(name) == 1
        title = f"`{name}`" if is_alone else f"`{name}` of `lckv.{command}`"
        yield from ("", f"### {title} {{#{kind.__name__}}}", "", summary(kind))
        keys = [name for name, key in keys_of(kind).items() if "." not in name and not key.is_group]
        yield from table(kind, keys, f"{name}.")


def summary(kind: type) -> str:
    """What the docstring of a dataclass says in front of its attributes."""
    return re.split(r"\n+Attributes:", inspect.getdoc(kind) or "")[0]


def table(kind: Any, names: list[str], prefix: str = "") -> Iterator[str]:
    """Keys with their types, defaults and meanings."""
    if not names:
        return
    yield from ("", '<div class="keys" markdown>', "", "| key | type | default | |", "|---|---|---|---|")
    said = {name: text for each in reversed(kind.__mro__) for name, text in meanings(each).items()}
    defaults = {item.name: item for item in fields(kind)}
    for name in names:
        item, declared = defaults[name], keys_of(kind)[name]
        value = item.default if item.default_factory is MISSING else item.default_factory()
        default = "needed" if declared.traits.get("required") else f"`{shown(value)}`"
        type_name = declared.type.__name__ if isinstance(declared.type, type) else str(declared.type)
        yield f"| `{prefix}{name}` | `{type_name.replace('typing.', '')}` | {default} | {said.get(name, '')} |"
    yield from ("", "</div>")


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    return {"None": "null", "True": "true", "False": "false", "": "''"}.get(str(value), str(value))


def meanings(kind: type) -> dict[str, str]:
    """What the `Attributes` of a dataclass's docstring say, by name."""
    _, _, text = (kind.__doc__ or "").partition("Attributes:\n")
    items = re.findall(r"^ {8}(\w+): (.*\n(?: {12}.*\n)*)", text, flags=re.MULTILINE)
    return {name: " ".join(meaning.split()).replace("|", "\\|") for name, meaning in items}


class DocstringLinks(griffe.Extension):
    """Lets the names that docstrings have in brackets and backticks, as transformers' do, lead to what they name.

    A name is looked up where its docstring stands, as Python would; what has no place in the site stays plain.
    """

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrites the docstrings of a package that has just been read."""
        found: list[griffe.Object] = [pkg]
        while found:
            here = found.pop()
            found += [each for each in here.members.values() if isinstance(each, griffe.Object)]
            if here.docstring is not None:
                here.docstring.value = re.sub(r"\[`([\w.]+)`\]", partial(link, here), here.docstring.value)


def link(here: griffe.Object, found: re.Match[str]) -> str:
    """The link from a docstring to a name in it."""
    name = found[1]
    first, dot, rest = name.partition(".")
    try:
        path = name if first == "lckv" else here.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        return f"`{name}`"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
