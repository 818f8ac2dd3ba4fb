"""The native model beside the example: another batch size, another length, a mask with padding, training mode.

The example inputs take one path through the user's code. An attribute that only another path reads, such as how often
key heads are repeated for a padded batch, can be found and verified on inputs that take the other path alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from graphcomp.capture.beside import TRAINING
from graphcomp.capture.second_inputs import Variant, padded_masks, variants
from graphcomp.coupling.analysis import Analysis
from graphcomp.coupling.groups import Kept
from graphcomp.ir.preserve import eval_copy
from graphcomp.native.masked_run import zeroed_model
from graphcomp.native.reference import (
    EXACT,
    Verdict,
    as_float64,
    difference,
    is_coarse,
    outputs_in_modes,
    outputs_of,
    refusal,
)
from graphcomp.native.runs import ModelRun, other_runs
from graphcomp.pruning.slice import SliceGroups

SAME_PATH = "other values"  # the variant that takes the path of the example


def _run(module: nn.Module, run: ModelRun) -> dict[str, Any]:
    with eval_copy(module, real=True) as copied, torch.no_grad():
        return run.run(copied)


@dataclass
class OtherRuns:
    """What the native model must return on other inputs.

    The reference is the user's model with zeros in place of what reads removed units. Where zeros are not enough, the
    sliced graph stands in, on inputs on which the whole graph gives what the user's model gives.

    Attributes:
        errors: name of the inputs -> largest relative difference of the last model that passed.
        unchecked: name of the inputs -> why nothing could be compared.
    """

    analysis: Analysis
    kept: Kept
    graph: nn.Module
    errors: dict[str, float] = field(default_factory=dict)
    unchecked: dict[str, str] = field(default_factory=dict)

    def compare(self, module: nn.Module) -> Verdict:
        """Run `module` on all other inputs, up to the first on which it differs.

        Raises:
            Whatever the module raises, with the name of the inputs as a note.
        """
        self.errors.clear()
        for inputs, expected in self.expected:
            try:
                verdict = self._compare(module, inputs, expected)
            except Exception as error:
                error.add_note(f"on {inputs.name}")
                raise
            if verdict.difference:
                return Verdict(difference=f"{verdict.difference}, on {inputs.name}")
            self.errors[inputs.name] = verdict.error
        for run, expected in self.expected_of_runs:
            verdict = self._compare_run(module, run, expected)
            if verdict.difference:
                return Verdict(difference=f"{verdict.difference}, on {run.name}")
            self.errors[run.name] = verdict.error
        verdict = self._compare_training(module)
        if verdict.difference:
            return verdict
        return Verdict(max((e for e in self.errors.values() if not math.isnan(e)), default=math.nan))

    def _compare_training(self, module: nn.Module) -> Verdict:
        """Run `module` in training mode, where training mode may do more than eval mode."""
        beside = self.analysis.beside
        if beside.modes is None or any(p.is_meta for p in module.parameters()):
            return Verdict()
        try:
            got = outputs_in_modes(module, beside.inputs, beside.modes)
        except Exception as error:
            error.add_note(TRAINING)
            raise
        found = difference(self._expected_in_training, got)
        if isinstance(found, str):
            return Verdict(difference=f"{found}, {TRAINING}")
        self.errors[TRAINING] = found
        return Verdict(found)

    @cached_property
    def _expected_in_training(self) -> dict[str, Any]:
        """What the native model must return in training mode; outputs without values where these are not known."""
        beside, captured = self.analysis.beside, self.analysis.captured
        whole = outputs_in_modes(captured.original, beside.inputs, beside.modes)
        try:
            found = self._run_in_training()
            again = self._run_in_training()
        except Exception as error:  # a recorded graph holds for one path
            found, why = None, f"its masked form does not run: {refusal(error)}"
        else:
            why = "there is no masked form of it"
            if found is not None and isinstance(difference(found, again or {}), str):
                found, why = None, "it draws random numbers, and no two runs are alike"
        if found is not None:
            return dict(zip(whole, found.values(), strict=True))
        self.unchecked[TRAINING] = f"{why}; it runs, and returns tensors of the right sizes"
        return {name: tensor.to("meta") for name, tensor in whole.items()}

    def _run_in_training(self) -> dict[str, Any] | None:
        """Run what stands for the masked model in training mode, if there is something that does."""
        beside = self.analysis.beside
        if self._zeroed is not None:
            return outputs_in_modes(self._zeroed, beside.inputs, beside.modes)
        pairs = zip(self.analysis.coupling.beside, beside.graphs, strict=True)
        for coupling, graph in pairs:
            if graph.what == TRAINING:
                return outputs_in_modes(SliceGroups(coupling, self.kept)(graph.module), beside.inputs, None)
        return None

    def _compare(self, module: nn.Module, inputs: Variant, expected: dict[str, Any]) -> Verdict:
        given = inputs.args, inputs.kwargs
        found = difference(expected, outputs_of(module, given))
        if not isinstance(found, str):
            return Verdict(found)
        if not any(is_coarse(p) for p in module.parameters()):
            return Verdict(difference=found)
        try:  # rounding may decide which expert or box is taken
            wanted = outputs_of(self._reference, given, exactly=True)
            exact = difference(wanted, outputs_of(module, given, exactly=True), EXACT)
        except Exception as error:  # a model may insist on its dtype in any way
            return Verdict(difference=f"{found}; in float64 the comparison does not run: {refusal(error)}")
        return Verdict(difference=found) if isinstance(exact, str) else Verdict(exact)

    def _compare_run(self, module: nn.Module, run: ModelRun, expected: dict[str, Any]) -> Verdict:
        try:
            found = difference(expected, _run(module, run))
        except Exception as error:
            error.add_note(f"on {run.name}")
            raise
        if not isinstance(found, str):
            return Verdict(found)
        try:  # rounding may decide which expert is taken
            wanted = _run(as_float64(self._reference), run)
            exact = difference(wanted, _run(as_float64(module), run), EXACT)
        except Exception as error:  # a model may insist on its dtype in any way
            self.unchecked[run.name] = f"{found}; in float64 the comparison does not run: {refusal(error)}"
            return Verdict()
        return Verdict(difference=found) if isinstance(exact, str) else Verdict(exact)

    @cached_property
    def expected_of_runs(self) -> list[tuple[ModelRun, dict[str, Any]]]:
        """Other ways to run the user's model, and what the native model must return."""
        found = []
        for run in other_runs(self.analysis.captured):
            try:
                wanted = _run(self._zeroed or self.analysis.captured.original, run)
            except Exception:  # the user's model does not run so: nothing is promised
                continue
            if self._zeroed is None:
                self.unchecked[run.name] = "ops take statistics over removed units, and only the graph masks them"
            else:
                found.append((run, wanted))
        return found

    @cached_property
    def _zeroed(self) -> nn.Module | None:
        return zeroed_model(self.analysis, self.kept)

    @property
    def _reference(self) -> nn.Module:
        return self.graph if self._zeroed is None else self._zeroed

    @cached_property
    def expected(self) -> list[tuple[Variant, dict[str, Any]]]:
        """Other inputs that the user's model takes, and what the native model must return on each."""
        captured = self.analysis.captured
        given = [inputs for inputs in variants(captured) if inputs.name != SAME_PATH]
        return list(self._references([*given, *padded_masks(captured)]))

    def _references(self, given: list[Variant]) -> Iterator[tuple[Variant, dict[str, Any]]]:
        captured = self.analysis.captured
        for inputs in given:
            try:
                wanted = outputs_of(
                    captured.original if self._zeroed is None else self._zeroed, (inputs.args, inputs.kwargs)
                )
            except Exception:  # the user's model does not take such inputs: nothing is promised
                continue
            wanted = self._that_matter(wanted)
            if self._zeroed is not None:
                yield inputs, wanted
                continue
            why = self._not_of_this_path(inputs, wanted)
            if why:
                self.unchecked[inputs.name] = why
                continue
            found = outputs_of(self.graph, (inputs.args, inputs.kwargs))
            yield inputs, dict(zip(wanted, found.values(), strict=False))

    def _that_matter(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """Return the outputs that the graph returns, too: the user may have dropped others."""
        names = set(self.analysis.captured.output_names)
        if not names <= outputs.keys():
            return outputs
        return {name: found for name, found in outputs.items() if name in names or name.startswith("input ")}

    def _not_of_this_path(self, inputs: Variant, wanted: dict[str, Any]) -> str:
        """Why the captured graph does not stand for the user's model on `inputs`, or ""."""
        captured = self.analysis.captured
        if not isinstance(self.graph, fx.GraphModule):
            return "the model was recorded on the example inputs, and the path of other inputs may differ"
        try:
            found = outputs_of(captured.module, (inputs.args, inputs.kwargs))
        except Exception as error:  # of a graph on inputs of a size that it does not take
            return f"the captured graph does not run on them: {refusal(error)}"
        if len(found) != len(wanted):
            return "the captured graph returns other outputs than the model"
        differing = difference(wanted, dict(zip(wanted, found.values(), strict=True)))
        return (
            f"the model takes another path than the captured graph: {differing}" if isinstance(differing, str) else ""
        )
