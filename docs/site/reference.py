"""The generated pages of the site, as Markdown: configuration, command lines, Python. Nothing of them is committed."""

import argparse
import os
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
Schema = dict[str, Any]


def pages() -> dict[str, str]:
    """What the site has besides pages of the repository, by address."""
    made = {"config": configuration(), "cli": commands(), "python": PYTHON}
    return {f"docs/reference/{name}.md": text for name, text in made.items()}


PYTHON = """# Python

## The package

::: gmmamba

## The store of a slide

::: slidestore.store

## Groups of patches

::: slidestore.groups

## What a model takes and gives

::: gmmamba.models.bag
"""


CONFIGURATION = """# Configuration

Every key of `config.yaml`, made from [its schema](../../workflow/schemas/config.schema.yaml), from which the defaults
are applied, too. `<name>` is a name of your choice. An unknown key stops the run before any job, naming the
nearest known one.
"""


def configuration() -> str:
    """workflow/schemas/config.schema.yaml as tables: a section a key of the file, a row a setting."""
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))
    page = [CONFIGURATION]
    for key, value in schema["properties"].items():
        needed = " Required." if key in schema["required"] else ""
        settings = rows(key, value, schema)
        _, kind, default, _ = settings[0]
        shown = f"{kind}; default {default}." if settings[0][0] == key else table(settings)
        page += [f"## {key}", about(resolved(value, schema)) + needed, shown]
    methods = dict(schema["$defs"]["methods"])
    page += ["## Methods", methods.pop("description"), "They are given under `models.<name>` and in `overrides`."]
    plugin = schema["$defs"]["css_plugin"]
    for name, method in methods.items():
        page += [f"### {name}", table(rows("", method, schema))]
    page += ["### CSS as a plug-in", about(plugin), table(rows("", plugin, schema))]
    return "\n\n".join(part for part in page if part) + "\n"


def resolved(node: Schema, schema: Schema) -> Schema:
    """The node with what its $ref names beneath it."""
    if "$ref" not in node:
        return node
    return schema["$defs"][node["$ref"].rsplit("/", 1)[1]] | node


def rows(key: str, node: Schema, schema: Schema, required: bool = False) -> list[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every setting at and below the node. Overrides of a section are one row."""
    node = resolved(node, schema)
    if node.get("partial"):
        section = node["$ref"].rsplit("/", 1)[1]
        return [(key, f"as [{section}](#{section})", "", about(node))]
    if "properties" in node:
        below = [
            row
            for name, child in node["properties"].items()
            if name != "method"
            for row in rows(f"{key}.{name}".strip("."), child, schema, name in node.get("required", []))
        ]
        return below
    more = node.get("additionalProperties")
    if isinstance(more, dict):
        described = [(key, "settings by name", "", about(node))] if "." in key else []
        return described + rows(f"{key}.<name>", more, schema)
    default = "required" if required else "" if "default" not in node else f"`{written(node['default'])}`"
    return [(key, type_of(node, schema), default, about(node))]


def type_of(node: Schema, schema: Schema) -> str:
    """In words: the values to choose from, or the type with its bounds."""
    node = resolved(node, schema)
    if "anyOf" in node:
        return " or ".join(type_of(choice, schema) for choice in node["anyOf"])
    if "enum" in node or "const" in node:
        return ", ".join(f"`{written(value)}`" for value in node.get("enum", [node.get("const")]))
    if node.get("type") == "array":
        return f"list of {type_of(node['items'], schema)}"
    types = node.get("type", "any")
    text = " or ".join({"object": "settings"}.get(t, t) for t in ([types] if isinstance(types, str) else types))
    signs = {
        "minimum": "≥",
        "exclusiveMinimum": ">",
        "maximum": "≤",
        "exclusiveMaximum": "<",
        "multipleOf": "multiple of",
    }
    bounds = [f"{sign} {written(node[key])}" for key, sign in signs.items() if key in node]
    return f"{text} {', '.join(bounds)}".strip()


def written(value: Any) -> str:
    """As it would stand in the file."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def about(node: Schema) -> str:
    """The description on one line; `<key>` and the like are no HTML."""
    parts = " ".join(node.get("description", "").split()).split("`")
    return "`".join(part if number % 2 else part.replace("<", "&lt;") for number, part in enumerate(parts))


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Keys below what all of them share, which is said once."""
    shared = os.path.commonpath([key.replace(".", "/").rpartition("/")[0] for key, *_ in rows]).replace("/", ".")
    lines = [f"In `{shared}`:\n"] if shared else []
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, *others in rows:
        key = key.removeprefix(f"{shared}.")
        lines.append(f"| `{key}` | " + " | ".join(cell.replace("|", "\\|") for cell in others) + " |")
    return "\n".join(lines)


def commands() -> str:
    """The help of every command line and of each of its commands."""
    from gmmamba.__main__ import parser as gmmamba
    from preprocessing.__main__ import parser as preprocessing
    from slidestore.__main__ import parser as slidestore

    page = ["# Command lines", "Those of the stages are called by the Snakemake rules; `--help` shows the same."]
    for parser in (gmmamba(), preprocessing(), slidestore()):
        page += [f"## {parser.prog}", help_of(parser)]
        for command in subcommands(parser).values():
            page += [f"### {command.prog}", help_of(command)]
    return "\n\n".join(page) + "\n"


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """By name; none where the parser has no subcommands."""
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def help_of(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100)
    return f"```text\n{parser.format_help()}```"
