"""Training and shrinking on the shared zoo: prepare, five steps of QASSO, shrink, finalize.

    python -m benchmarks.prepared                                # every model that can be exported: hours on a core
    python -m benchmarks.prepared --families hf --json prepared.jsonl --resume

Of each model a third of the units goes. Then the module without them must compute what the one with masks computes,
with the same gradients, and `finalize` must verify: trained == sliced, and integers == fake-quant. Quantizers have 16
bits, with which a sum in another order turns few codes; where it turned too many, float64 decides. Each model runs in a
process of its own, on one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import graphcomp as gc
from benchmarks import common
from benchmarks.common import brief, section, table, timed
from benchmarks.over_zoo import Row, by_family, parser_of, rows_of
from graphcomp.numerics.compare import relative_error
from graphcomp.pruning.slice import kept_of_tensors, select
from graphcomp.torch_compat import pytree

SECONDS = 900
SPARSITY = 0.33
SCHEDULE = gc.Schedule(5, warmup=1, projection=1, joint=2, projection_periods=1, pruning_periods=1)
ALLOWED = 1e-2
"""Of outputs and of each gradient, relative: steps of 16 bits, summed up through a deep network."""


def main() -> None:
    report(rows_of(parser_of(__doc__).parse_args(), laws, _line, seconds=SECONDS))


def laws(case: Any) -> Row:
    """Train one model for five steps, without and with the units that go."""
    stage = "train and shrink"
    try:
        with timed() as clock:
            ready, small, args, kwargs = trained(case, torch.float32)
            stage = "compare"
            found, judged_in = differences(ready, small, args, kwargs), "float32"
            parameters = [sum(p.numel() for p in module.parameters()) for module in (ready, small)]
            stage = "finalize"
            report = gc.finalize(small).report
            stage = "compare in float64"
            if max(found[:2]) > ALLOWED:  # codes that a rounding turned, or a wrong cut: there are no roundings here
                found, judged_in = differences(*trained(case, torch.float64)), "float64"
    except Exception as error:
        return {"failure": f"{stage}: {brief(error)}"}
    output, gradient, where = found
    assert isinstance(report, gc.Report)
    failure = f"compare: outputs {output:.1e}, gradients {gradient:.1e} off, of {where}"
    return {
        **({} if max(output, gradient) <= ALLOWED else {"failure": failure}),
        "output": output,
        "gradient": gradient,
        "judged in": judged_in,
        "units": [report.units_removed, report.units_total],
        "parameters": parameters,
        "seconds": clock.seconds,
    }


def trained(case: Any, dtype: torch.dtype) -> tuple[gc.Prepared, gc.Prepared, Any, Any]:
    """The module after training, in eval mode, the same without the units that are gone, and what they take."""
    model, *inputs = case.build()
    args, kwargs = pytree.tree_map(
        lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs
    )
    ready = gc.prepare(model.to(dtype), args, kwargs, bits=16).train()
    optimizer = gc.QASSO(ready, torch.optim.SGD, lr=1e-5, sparsity=SPARSITY, schedule=SCHEDULE)
    for _ in range(SCHEDULE.steps):
        optimizer.zero_grad()
        loss(ready, args, kwargs).backward()
        optimizer.step()
    ready.eval()
    return ready, gc.shrink(ready), args, kwargs


def loss(module: gc.Prepared, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The mean square of everything that the module returns and can be trained on."""
    tensors = common.shared_module("zoo.py").tensors(module(*args, **kwargs))
    return torch.stack([t.square().mean() for t in tensors if t.requires_grad]).sum()


def differences(
    ready: gc.Prepared, small: gc.Prepared, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[float, float, str]:
    """Relative, of the outputs in eval mode, and the largest of a parameter's gradient, and whose that is."""
    tensors = common.shared_module("zoo.py").tensors
    outputs = []
    for module in (ready, small):
        module.eval()
        module.zero_grad()
        with torch.no_grad():
            outputs.append(tensors(module(*args, **kwargs)))
        loss(module, args, kwargs).backward()
    cuts = kept_of_tensors(ready.session.quantized.coupling, ready.kept())
    whole = {name: p.grad for name, p in ready.named_parameters() if p.grad is not None}
    scale = max(float(g.norm()) for g in whole.values())
    worst, where = 0.0, ""
    for name, p in small.named_parameters():
        if p.grad is None or name not in whole or "graphcomp" in name:  # codes turned by rounding are all theirs
            continue
        expected = select(whole[name], cuts.get(name, {}))
        error = float((p.grad - expected).norm()) / max(float(expected.norm()), 1e-4 * scale)
        if not error <= worst:
            worst, where = error, name
    return relative_error(outputs[0], outputs[1]), worst, where


def _line(row: Row) -> str:
    units, parameters = "{} of {} units".format(*row["units"]), "{1:,} of {0:,} parameters".format(*row["parameters"])
    errors = f"outputs {row['output']:.0e}, gradients {row['gradient']:.0e} off"
    return f"{errors}, {units} gone, {parameters} left, {row['seconds']:.0f} s"


def report(rows: Sequence[Row]) -> None:
    """One line per family."""
    lines = []
    for family, models, good, worst in by_family(rows, "output", "gradient"):
        pruned = sum(row["units"][0] > 0 for row in good)
        lines.append([family, models, len(good), pruned, *(f"{w:.1e}" for w in worst)])
    columns = ["family", "models", "shrunk == masked, and finalized", "some units gone", "outputs off", "gradients off"]
    section("Trained, shrunk and finalized", table(columns, lines))


if __name__ == "__main__":
    main()
