"""Options as flags of the command line, and back. A field of `Options` is a flag, and its docstring the flag's help."""

from __future__ import annotations

import dataclasses
import inspect
import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, get_type_hints

import docstring_parser
import tyro
from rich.text import Text as Styled
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from shardc.errors import ShardcError
from shardc.options import Options, Text

REGISTRY = ConstructorRegistry()


def parsed(commands: Any, arguments: Sequence[str] | None, description: str) -> Any:
    """The one of `commands` (a union of dataclasses) that `arguments`, by default those of the process, ask for. Raises
    ShardcError for what cannot be read. Prints what `--help` and `--tyro-print-completion SHELL` ask for, and exits."""
    complaint = io.StringIO()
    words = _joined(sys.argv[1:] if arguments is None else arguments)
    try:
        with redirect_stderr(complaint):
            return tyro.cli(
                commands,
                prog="shardc",
                description=description,
                args=words,
                registry=REGISTRY,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        raise ShardcError(_unframed(complaint.getvalue())) from None


def _joined(words: Sequence[str]) -> list[str]:
    """The words, with `--layout -,tp` as `--layout=-,tp`: argparse would take the layout for a flag. No flag has a
    comma after its dash."""
    joined = list[str]()
    for word in words:
        if word.startswith("-,") and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def spelled(options: Options, kind: type[Options]) -> list[str]:
    """The flags that give the fields of `kind` the values that they have in `options`: `["--memory=80GB"]`. Fields that
    have their default are left out."""
    default, words = kind(), list[str]()
    for one in fields(kind):
        value, text = getattr(options, one.name), _texts(kind).get(one.name, PLAIN)
        if value != getattr(default, one.name):
            flag = text.flag or one.name.replace("_", "-")
            entries = value.items() if text.flag else (value,)
            words += [f"--{flag}={text.write(entry)}" for entry in entries]
    return words


PLAIN = Text("", "")
"""How an option is written that is a word or a number."""


@cache
def _texts(kind: type[Options]) -> dict[str, Text]:
    """The fields of `kind` that say how they are written."""
    hints = get_type_hints(kind, include_extras=True)
    said = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: one for name, marks in said.items() for one in marks if isinstance(one, Text)}


@REGISTRY.struct_rule
def _options_rule(info: StructTypeInfo) -> StructConstructorSpec | None:
    """tyro's way to make `Options`: a flag a field."""
    kind = info.type
    if not (inspect.isclass(kind) and issubclass(kind, Options)):
        return None
    texts, helps, hints = _texts(kind), _docstrings(kind), get_type_hints(kind)

    def made(**given: Any) -> Options:
        given |= {name: _mapping(text, given[name]) for name, text in texts.items() if text.flag}
        return kind(**given)

    specs = [_flag(one, hints[one.name], texts.get(one.name), helps.get(one.name)) for one in fields(kind)]
    return StructConstructorSpec(made, tuple(specs))


def _flag(one: dataclasses.Field[Any], hint: Any, text: Text | None, help: str | None) -> StructFieldSpec:
    hint_of_default = "" if one.default is None else None
    if text is None:
        told = tyro.conf.arg(help_behavior_hint=hint_of_default)
        valued = tyro.conf.FlagConversionOff  # `--loud=True`: what is written back is read again
        return StructFieldSpec(one.name, Annotated[hint, told, valued], one.default, help)  # type: ignore[arg-type]
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=text.form,
        instance_from_str=lambda words: text.read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [text.write(value)],
    )
    if text.flag:
        told = tyro.conf.arg(name=text.flag, help_behavior_hint=f"(like {text.example}; repeatable)")
        several = Annotated[tuple[Annotated[str, spec], ...], tyro.conf.UseAppendAction, told]
        return StructFieldSpec(one.name, several, (), help)  # type: ignore[arg-type]
    told = tyro.conf.arg(help_behavior_hint=f"(like {text.example})" if one.default is None else None)
    return StructFieldSpec(one.name, Annotated[object, spec, told], one.default, help)  # type: ignore[arg-type]


def _mapping(text: Text, entries: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict[str, Any]()
    for key, value in entries:
        if key in mapping:
            raise ShardcError(f"--{text.flag} names {key!r} twice; say all of it in one")
        mapping[key] = value
    return mapping


def _docstrings(kind: type[Options]) -> dict[str, str]:
    """The docstrings of the fields, in one line each."""
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        params = docstring_parser.parse_from_object(base).params
        said |= {one.arg_name: " ".join(one.description.split()) for one in params if one.description}
    return said


def _unframed(box: str) -> str:
    """What tyro tells in a box, without the box and the help texts, which are what is indented most."""
    _title, *lines = Styled.from_ansi(box).plain.splitlines()
    bare = [re.sub(r"^[│ ] |│$", "", line).rstrip() for line in lines]
    return "\n".join(line for line in bare if not re.fullmatch(r"[╰ ]?[─-]+╯?| {8}.*", line)).strip()
