"""Names of the entries of a plan, by which a file says which operator or value it means.

%w = parameter             parameters   layers.0.up.weight
%h = mm(%x, %w)            operators    layers.0.up mm
%g = mm(%t, %x)            operators    layers.0.up backward mm
%y = mm(%h, %w2)           operators    layers.0.up mm#2                    the second one of this module and phase

Layers repeat. Entries of one text whose names differ in numbers are written once: `layers.*.up mm`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TypeVar

from torch import fx

from shardc.ir.facts import origin_of
from shardc.ir.program import Port, Program, Role, name_of, output_names
from shardc.rules.factors.factored import Factored

OPERATORS = "operators"
OUTPUTS = "outputs"
SECTIONS = {
    Role.PARAMETER: "parameters",
    Role.BUFFER: "buffers",
    Role.CONSTANT: "constants",
    Role.INPUT: "inputs",
    Role.TANGENT: "tangents",
}
"""The sections of a plan that have what a program is given, by its role."""

Name = tuple[str, str]
"""A section, and the name of an entry in it."""

Text = TypeVar("Text")
_NUMBER = re.compile(r"(?:(?<=[. ])|^)\d+(?=[. ]|$)")


def names_of(factored: Factored) -> dict[fx.Node, Name]:
    """The name of every operator and placeholder."""
    ports = dict(zip(factored.program.placeholders, factored.program.inputs, strict=True))
    seen: Counter[str] = Counter()
    names: dict[fx.Node, Name] = {}
    for op in factored.ops:
        port = ports.get(op.node)
        if port is not None:
            names[op.node] = SECTIONS[port.role], port.name or str(port.index)
            continue
        place = origin_of(op.node)
        words = (place.module, "backward" if place.phase == "backward" else "", name_of(op.node.target).strip("_"))
        name = " ".join(filter(None, words))
        seen[name] += 1
        names[op.node] = OPERATORS, name if seen[name] == 1 else f"{name}#{seen[name]}"
    return names


def output_entries(program: Program) -> dict[int, str]:
    """The names of the outputs that a plan lays out, by their position: those of the user's structure, buffers that
    are written, and gradients of inputs."""
    leaves = zip(output_names(program.out_spec), program.out_leaves, strict=False)  # see Program
    named = {leaf: name for name, leaf in reversed([*leaves]) if isinstance(leaf, int)}
    entries: dict[int, str] = {}
    for index, port in enumerate(program.outputs):
        name = named.get(index) or _output_name(port)
        entries[index] = name if name not in entries.values() else f"{name}#{index}"
    return entries


def _output_name(port: Port) -> str:
    of = " of" if port.role is Role.GRADIENT else ""
    return f"{port.role.value}{of} {port.name or port.index}"


def pattern_of(name: str) -> str:
    """The name with `*` for every number of its path."""
    return _NUMBER.sub("*", name)


def folded(entries: Mapping[str, Text]) -> dict[str, Text]:
    """The same entries with those of repeated layers in one: what most of them say stands under their pattern, and
    what others say under their names."""
    groups: dict[str, dict[str, Text]] = {}
    for name, text in entries.items():
        groups.setdefault(pattern_of(name), {})[name] = text
    short: dict[str, Text] = {}
    for pattern, group in groups.items():
        common, count = Counter(group.values()).most_common(1)[0]
        if len(group) == 1 or 2 * count <= len(group):
            short |= group
        else:
            short |= {pattern: common, **{name: text for name, text in group.items() if text != common}}
    return short


def unfolded(entries: Mapping[str, Text], names: Collection[str]) -> tuple[dict[str, Text], list[str]]:
    """What `entries` say of every one of the `names`, and the entries that are about none of them. A name counts
    before a pattern, and a pattern with fewer `*` before one with more."""
    patterns = {name: pattern_of(name) for name in names}
    whole = set(patterns.values())
    others = sorted((key for key in entries if "*" in key and key not in whole), key=lambda key: key.count("*"))
    tests = [(key, re.compile(r"[^. ]*".join(map(re.escape, key.split("*"))))) for key in others]

    def among(name: str) -> Iterator[str]:
        yield name
        yield from (key for key, test in tests if test.fullmatch(name))
        yield patterns[name]

    found: dict[str, Text] = {}
    used = set[str]()
    for name in names:
        matching = [key for key in among(name) if key in entries]
        used.update(matching)
        if matching:
            found[name] = entries[matching[0]]
    return found, [key for key in entries if key not in used]
