"""A plan: all that one run of the command line does, as a JSON file that a person may edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from graphcomp.arguments import check_instance
from graphcomp.cli.inputs import from_file, from_shapes
from graphcomp.cli.sources import Source
from graphcomp.errors import GraphcompError, InputError, PlanError
from graphcomp.pruning.allocation import Budget
from graphcomp.report.report import Report
from graphcomp.system.files import replacing

FORMAT = 1
"""Of the file."""

OPTIONS = (
    "sparsity", "bits", "activation_bits", "activations", "group_size", "rounding", "reduce_range", "saliency",
    "ranking", "rounds", "repair", "ignore", "keep_inputs", "prune", "round_to", "budget", "prefer_native", "uniform",
    "keep_class", "scope", "outputs", "verify", "measure_latency", "seed",
)  # fmt: skip
"""Options of `compress` that a plan holds, as JSON has them; a budget is a mapping, bits of a range are a list."""

ENTRIES = {"inputs": {"shapes", "file"}, "calibration": {"path", "samples"}}
"""Entry of a plan -> the entries inside."""

SUFFIXES = ("onnx", "pt2")
"""Formats of exported files."""


@dataclass(frozen=True)
class Plan:
    """What one run does.

    Attributes:
        model: name of the model (`graphcomp.cli.sources`).
        pretrained: with trained weights, where the name alone does not say.
        inputs: {"shapes": […]}, {"file": …}, or {} for those that the source suggests.
        calibration: {"path": …, "samples": …}; {} for none.
        options: of `compress`.
        groups: one entry per group: name, role, module, units, chosen (by the options), keep (what stays; to edit).
        export: formats.
        guard: leave layers of an .onnx file in float where the file is faster so.
    """

    model: str
    pretrained: bool = True
    inputs: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[Mapping[str, Any], ...] = ()
    export: tuple[str, ...] = ()
    guard: bool = False

    def to_json(self) -> str:
        """Return the text of a plan file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write a plan file, whole or not at all."""
        with replacing(path) as fresh:
            fresh.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Return the plan of a file.

        Raises:
            PlanError: there is no such file, or the file holds something else.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path} holds no plan", why=f"{type(error).__name__}: {error}") from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise PlanError(f"{path} holds no plan of format {FORMAT}", fix="graphcomp compress … --dry-run writes one")
        try:
            return cls.checked(data)
        except GraphcompError as error:
            raise PlanError(error.what, at=str(path), why=error.why, fix=error.fix) from error

    @classmethod
    def checked(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan of plain data.

        Raises:
            PlanError: an entry is unknown, or of another type.
        """
        known = {own.name for own in fields(cls)}
        if set(data) - known or "model" not in data:
            raise PlanError(f"entries of a plan must be {sorted(known)}, got {sorted(data)}")
        kinds: dict[str, Any] = {
            "model": str, "pretrained": bool, "inputs": dict, "calibration": dict, "options": dict,
            "groups": (list, tuple), "export": (list, tuple), "guard": bool,
        }  # fmt: skip
        for name, value in data.items():
            check_instance(name, value, kinds[name], "see the plan that --dry-run writes")
        plan = cls(**{**data, "groups": tuple(data.get("groups", ())), "export": tuple(data.get("export", ()))})
        if wrong := sorted(set(plan.options) - set(OPTIONS)):
            raise PlanError(f"a plan has no option {wrong[0]!r}", fix=f"one of: {', '.join(OPTIONS)}")
        for suffix in plan.export:
            if suffix not in SUFFIXES:
                raise PlanError(f"there is no format {suffix!r}", fix=f"one of: {', '.join(SUFFIXES)}")
        for name, own, needed in (("inputs", plan.inputs, ()), ("calibration", plan.calibration, ("path",))):
            if set(own) - ENTRIES[name] or (own and set(needed) - set(own)):
                raise PlanError(f"entries of {name} must be {sorted(ENTRIES[name])}, got {sorted(own)}")
        for group in plan.groups:
            _check_group(group)
        return plan

    def example(self, source: Source) -> Any:
        """Return the example inputs.

        Raises:
            InputError: they are neither given nor suggested by the source, or cannot be read.
        """
        if "shapes" in self.inputs:
            return from_shapes(self.inputs["shapes"])
        if "file" in self.inputs:
            return from_file(Path(self.inputs["file"]))
        if source.example is None:
            raise InputError("there are no example inputs", fix="--shape 1,3,224,224, or --inputs data.npz")
        return source.example

    @property
    def edited(self) -> tuple[Mapping[str, Any], ...]:
        """Return the groups of which another number stays than the options chose."""
        return tuple(group for group in self.groups if group["keep"] != group["chosen"])

    def keywords(self) -> dict[str, Any]:
        """Return the keywords of `compress`; edited groups take the place of sparsity and budget.

        Raises:
            PlanError: no group is cut, or a budget has an entry that budgets lack.
        """
        options = dict(self.options)
        if self.edited:
            for name in ("sparsity", "budget", "ranking"):
                options.pop(name, None)
            cut = {g["module"]: 1 - g["keep"] / g["units"] for g in self.groups if g["keep"] < g["units"]}
            options["sparsity"] = cut or 0.0
        if isinstance(options.get("budget"), Mapping):
            try:
                options["budget"] = Budget(**options["budget"])
            except TypeError as error:
                raise PlanError(f"budget={options['budget']!r}", why=str(error), fix='{"macs": 0.5}') from error
        for name in ("bits", "activation_bits", "prune", "ignore", "keep_inputs"):
            if isinstance(options.get(name), list):
                options[name] = tuple(options[name])
        return options


def _check_group(group: Any) -> None:
    """Raise PlanError where an entry of `groups` cannot be carried out."""
    names = ("name", "role", "module", "units", "chosen", "keep")
    if not isinstance(group, Mapping) or set(names) - set(group):
        raise PlanError(f"each group must have {', '.join(names)}, got {group!r}")
    keep, units = group["keep"], group["units"]
    if isinstance(keep, bool) or not isinstance(keep, int) or not 1 <= keep <= units:
        raise PlanError(f"keep must be from 1 to {units}, got {keep!r}", why=f"in the group {group['name']!r}")


def groups_of(report: Report) -> tuple[dict[str, Any], ...]:
    """Return the entries of a plan for the groups of a report."""
    found = []
    for group in report.groups:
        reads = set(group["consumers"])
        makes = [member.rpartition("[")[0] for member in group["members"] if member not in reads]
        module = next((name.rpartition(".")[0] for name in makes), "")
        units = group["units"]
        found.append({
            "name": group["name"], "role": group["role"], "module": module, "units": units["total"],
            "chosen": units["kept"], "keep": units["kept"],
        })  # fmt: skip
    return tuple(found)


def inputs_entry(shapes: Sequence[str], file: Path | None) -> dict[str, Any]:
    """Return the entry `inputs` of a plan.

    Raises:
        InputError: shapes and a file are given.
    """
    if shapes and file is not None:
        raise InputError("--shape and --inputs are given", fix="one of the two")
    if file is not None:
        return {"file": str(file)}
    return {"shapes": list(shapes)} if shapes else {}
