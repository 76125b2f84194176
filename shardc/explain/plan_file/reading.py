"""A file of a plan, read and checked, and compared with the program that it is to be for.

What does not fit is refused with what changed: a parameter, a shape, an operator, an option. Files of other versions of
the format are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shardc.errors import ShardcError
from shardc.explain.plan_file.as_json import DECIDED, FORMAT, decisions_digest
from shardc.explain.plan_file.asked import hardware_json, options_json
from shardc.explain.plan_file.fingerprint import Fingerprint, fingerprint
from shardc.ir.mesh import Mesh
from shardc.options import Options
from shardc.planning.compilation import Compilation
from shardc.planning.constraints import Constraint, demanded_leaves
from shardc.planning.given.given import EntryReader, GivenPlan
from shardc.planning.given.names import OPERATORS, OUTPUTS, Name, names_of, output_entries, unfolded
from shardc.planning.given.proof import MEMORY_NETWORK, PLAIN_NETWORK, RECOMPUTE_NETWORK, Proof

AGAIN = "plan again, without plan=, and save that plan"
MOST = 8
"""So many differences are told one by one."""


@dataclass(frozen=True)
class PlanFile:
    """The contents of a file of a plan. `source` names it in messages."""

    source: str
    data: Mapping[str, Any]

    @staticmethod
    def read(path: str | Path) -> PlanFile:
        """Raises ShardcError for what is no file of a plan, or one of another version of shardc or of the format."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ShardcError(
                f"cannot read the plan {path}: {reason}; plan.save({str(path)!r}) or `shardc plan FILE -o {path}` "
                "writes one"
            ) from error
        return PlanFile.parse(text, str(path))

    @staticmethod
    def parse(text: str, source: str) -> PlanFile:
        """The same of a text."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ShardcError(f"{source} is not JSON: {error}") from error
        if not isinstance(data, dict) or "version" not in data or "operators" not in data:
            raise ShardcError(f"{source} is no plan of shardc: it lacks a version, or operators; {AGAIN}")
        if data["version"] != FORMAT:
            raise ShardcError(f"{source} has version {data['version']} of the format; this is {FORMAT}: {AGAIN}")
        _check_kinds(data, source)
        return PlanFile(source, data)

    @property
    def mesh(self) -> Mesh:
        """The mesh that it is for."""
        return Mesh(tuple(self.data["mesh"].items()))

    @property
    def trains(self) -> bool:
        """Whether it is of a program that makes gradients of parameters."""
        return bool(self.data["program"]["trains"])

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes for which it was made, of dims that change from call to call, by name."""
        return dict(self.data["program"].get("sizes", {}))

    def asked(self, options: Options) -> dict[str, Any]:
        """The options of the file that `options` leave at their defaults. Raises ShardcError where both ask, and for
        different things, and where the file is of another shardc."""
        if self.data["shardc"] != version("shardc"):
            self._refuse([f"shardc is {version('shardc')}, and was {self.data['shardc']}"])
        ours, default, changed = options_json(options), options_json(Options()), list[str]()
        theirs, taken = {**default, **self.data["options"]}, dict[str, Any]()
        for name, value in theirs.items():
            if ours.get(name) == value:
                continue
            if name in default and ours[name] == default[name]:
                taken[name] = value
            else:
                changed.append(f"{name} is {ours.get(name)!r}, and was {value!r}")
        self._refuse(changed)
        if "dynamic" in taken:
            taken["dynamic"] = {
                argument: {int(dim): name for dim, name in dims.items()} for argument, dims in taken["dynamic"].items()
            }
        return taken

    def check_mesh(self, mesh: Mesh) -> None:
        """Raise ShardcError unless the file is for this mesh."""
        self._refuse([f"the mesh is {mesh}, and was {self.mesh}"] if mesh != self.mesh else [])

    def given(self, c: Compilation) -> GivenPlan:
        """Its decisions for a program that was factored. Raises ShardcError, with what changed, unless it is for this
        program, hardware and these options."""
        self.check_mesh(c.mesh)
        before, now = self.data["hardware"], hardware_json(c.options.device)
        self._refuse(_changes("hardware ", before, now))
        self._refuse(_changes("option ", {**options_json(c.options), **self.data["options"]}, options_json(c.options)))
        self._check_program(fingerprint(c.factored))
        given = self.decisions(c)
        reader = EntryReader(given, c.factored, c.mesh)
        for constraint in c.constraints:
            self._check_demand(constraint, reader, c)
        return given

    def _check_demand(self, constraint: Constraint, reader: EntryReader, c: Compilation) -> None:
        """Raise ShardcError where a parameter lies otherwise than is demanded: it may be stored otherwise by now."""
        op = next(op for op in c.factored.ops if op.node is constraint.key[0])
        entry = reader.entry(op)
        made = entry.made.get(constraint.key[1]) if entry is not None and op.node.op == "placeholder" else None
        if made is not None:
            for leaf, axes in demanded_leaves(c.factored, c.mesh, constraint):
                if made.axes[leaf] != axes:
                    raise ShardcError(
                        f"{reader.label(op)}, but {constraint.label} demands {constraint.text}: write that, or change "
                        "what is demanded"
                    )

    def decisions(self, c: Compilation) -> GivenPlan:
        """Its decisions for a program that is known to be the one that it is for."""
        names = [*names_of(c.factored).values(), *((OUTPUTS, n) for n in output_entries(c.factored.program).values())]
        found, missing = dict[Name, str](), False
        for section in DECIDED:
            own = [name for of, name in names if of == section]
            entries, unused = unfolded(self.data.get(section, {}), own)
            if unused:
                near = ", ".join([repr(name) for name in own[:MOST]])
                raise ShardcError(
                    f"{self.source}: {section}[{unused[0]!r}] names nothing in the program; it has {near or 'none'}"
                )
            found |= {(section, name): text for name, text in entries.items() if text is not None}
            missing = missing or (section != OUTPUTS and any(entries.get(name) is None for name in own))
        proof = self.proof
        folds = {*proof.folded_axes, *(axis for axis in c.mesh.names for text in found.values() if f"{axis}~" in text)}
        outputs = {name: text for (section, name), text in found.items() if section == OUTPUTS}
        entries = {name: text for name, text in found.items() if name[0] != OUTPUTS}
        edited = missing or decisions_digest(self.data) != self.data["proof"]["decisions"]
        return GivenPlan(self.source, entries, outputs, tuple(sorted(folds)), None if edited else proof)

    @property
    def proof(self) -> Proof:
        """What it says was proved."""
        said = self.data["proof"]
        return Proof(
            float(said["cost"]),
            float(said["lower_bound"]),
            said["network"],
            tuple(said["folded_axes"]),
            said["capacity"],
            {int(position): float(value) for position, value in said["multipliers"].items()},
        )

    def _check_program(self, now: Fingerprint) -> None:
        before = self.data["program"]
        if before["fingerprint"] == now.digest:
            return
        after, changed = now.as_json(), list[str]()
        if before["trains"] != after["trains"]:
            changed.append(
                "the program " + ("makes" if now.trains else "makes no") + " gradients of parameters, and the file's "
                + ("does not" if now.trains else "does")
            )  # fmt: skip
        for section in ("given", "returned", "operators"):
            changed += _changes("", before[section], after[section], hashed=section == OPERATORS)
        self._refuse(changed or ["which values its operators read"], "the program changed")

    def _refuse(self, changed: list[str], what: str = "something changed since") -> None:
        if changed:
            more = f"\n  - and {len(changed) - MOST} more" if len(changed) > MOST else ""
            lines = "".join(f"\n  - {line}" for line in changed[:MOST])
            raise ShardcError(f"{self.source} is not a plan for this call: {what}{lines}{more}\n{AGAIN}")


def _changes(prefix: str, before: Mapping[str, Any], now: Mapping[str, Any], hashed: bool = False) -> list[str]:
    """A line for every entry that differs, in nested mappings too. Of what is `hashed`, values tell nothing."""
    lines: list[str] = []
    for name in dict.fromkeys([*now, *before]):
        if name not in now or name not in before:
            lines.append(f"{prefix}{name} is {'new' if name in now else 'gone'}")
        elif isinstance(before[name], Mapping) and isinstance(now[name], Mapping):
            lines += _changes(f"{prefix}{name}.", before[name], now[name])
        elif before[name] != now[name] and hashed:
            lines.append(f"{prefix}{name} has other arguments, shapes, or another rule or number of layers")
        elif before[name] != now[name]:
            lines.append(f"{prefix}{name} is {_shown(now[name])}, and was {_shown(before[name])}")
    return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_kinds(data: Mapping[str, Any], source: str) -> None:
    """Raise ShardcError where something is of another kind than the schema says."""

    def demand(holds: bool, path: str, kind: str) -> None:
        if not holds:
            raise ShardcError(f"{source}: {path} is not {kind}; see shardc/explain/plan_file/schema.json")

    def is_table(value: Any, of: Iterable[type]) -> bool:
        return isinstance(value, dict) and all(isinstance(k, str) and type(v) in of for k, v in value.items())

    for section in DECIDED:
        for name, text in data[section].items() if isinstance(data.get(section), dict) else ():
            demand(text is None or isinstance(text, str), f"{section}[{name!r}]", "a text or null")
        demand(isinstance(data.get(section, {}), dict), section, "a table of texts")
    demand(is_table(data.get("mesh"), [int]) and bool(data["mesh"]), "mesh", "a table of axes and their sizes")
    for name in ("options", "predicted", "hardware", "program", "proof"):
        demand(isinstance(data.get(name), dict), name, "a table")
    demand(isinstance(data.get("shardc"), str), "shardc", "a version")
    demand(isinstance(data.get("conversions"), list), "conversions", "a list")
    program, proof = data["program"], data["proof"]
    for name in ("given", "returned", "operators"):
        demand(is_table(program.get(name), [str]), f"program.{name}", "a table of texts")
    demand(is_table(program.get("sizes", {}), [int]), "program.sizes", "a table of sizes")
    demand(isinstance(program.get("fingerprint"), str), "program.fingerprint", "a text")
    demand(isinstance(program.get("trains"), bool), "program.trains", "true or false")
    for name in ("cost", "lower_bound"):
        demand(_is_number(proof.get(name)), f"proof.{name}", "a number")
    demand(proof.get("capacity") is None or _is_number(proof["capacity"]), "proof.capacity", "a number or null")
    networks = (PLAIN_NETWORK, MEMORY_NETWORK, RECOMPUTE_NETWORK)
    demand(proof.get("network") in networks, "proof.network", f"one of {', '.join(networks)}")
    axes = proof.get("folded_axes")
    demand(isinstance(axes, list) and set(axes) <= set(data["mesh"]), "proof.folded_axes", "a list of axes")
    multipliers = proof.get("multipliers")
    fine = isinstance(multipliers, dict) and all(k.isdigit() and _is_number(v) for k, v in multipliers.items())
    demand(fine, "proof.multipliers", "a table of numbers by position")
    demand(isinstance(proof.get("decisions"), str), "proof.decisions", "a text")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
