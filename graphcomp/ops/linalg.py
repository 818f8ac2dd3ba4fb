"""Factorisations, inverses and functions of matrices: the last two dims are frozen, batch dims pass."""

from __future__ import annotations

from typing import Any

import torch

from graphcomp.coupling.axis import Axes, fresh, length
from graphcomp.ops.call import AxesValue, Call
from graphcomp.ops.create import overloads
from graphcomp.ops.facts import in_float
from graphcomp.ops.index import whole
from graphcomp.ops.registry import op

aten = torch.ops.aten

FACTORED = in_float("factored, solved or inverted in float; costs are not counted, as by convention")


@op(
    *overloads(
        aten.linalg_inv, aten.linalg_inv_ex, aten.inverse, aten.linalg_det, aten._linalg_det, aten.det, aten.logdet,
        aten.slogdet, aten.linalg_slogdet, aten._linalg_slogdet, aten.linalg_cholesky, aten.linalg_cholesky_ex,
        aten.cholesky, aten.cholesky_inverse, aten.linalg_qr, aten._linalg_svd, aten.linalg_svdvals, aten.linalg_eig,
        aten.linalg_eigvals, aten._linalg_eigh, aten.linalg_eigvalsh, aten.matrix_exp, aten.linalg_matrix_exp,
        aten.matrix_power, aten.linalg_matrix_power, aten.pinverse, aten.linalg_lu_factor, aten.linalg_lu,
    ),
    aten.qr.default, aten.svd.default, aten.linalg_svd.default, aten.linalg_eigh.default, aten.linalg_pinv.default,
    facts=FACTORED,
)  # fmt: skip
def matrices(call: Call, **arguments: Any) -> list[Axes]:
    """... a b -> ... and whatever comes out of a matrix."""
    axes = next(value for value in arguments.values() if isinstance(value, AxesValue))
    call.freeze(axes[-2:], "a matrix is factored or inverted as a whole")
    batch = axes[:-2]
    lengths = tuple(map(length, batch))
    results: list[Axes] = []
    for shape in call.shapes:
        kept = batch if shape[: len(batch)] == lengths else ()
        results.append((*kept, *(fresh(n, call.why) for n in shape[len(kept) :])))
    return results


op(
    *overloads(
        aten.linalg_solve, aten._linalg_solve_ex, aten.linalg_lstsq, aten.linalg_lu_solve, aten.lu_solve,
        aten.cholesky_solve, aten.linalg_solve_triangular, aten.linalg_matrix_norm, aten.linalg_matrix_rank,
        aten.linalg_cond, aten.nuclear_norm, aten.linalg_tensorinv, aten.linalg_tensorsolve,
        aten.linalg_householder_product,
    ),
    aten.triangular_solve.default, aten.lu_unpack.default, whole, facts=FACTORED,
)  # fmt: skip
