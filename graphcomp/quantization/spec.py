"""QuantSpec: how one tensor is quantized. QuantConfig: which spec goes where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, overload

from graphcomp.arguments import (
    as_names,
    check_flag,
    check_instance,
    check_mapping,
    check_whole,
    check_word,
    shown,
    wrong,
)
from graphcomp.errors import PlanError

MIN_BITS, MAX_BITS = 2, 16

Granularity = Literal["tensor", "channel", "group", "token"]
Kind = Literal["uniform", "geta", "ternary", "mixed"]
Observer = Literal["minmax", "percentile", "mse", "entropy", "output"]


class _Default(int):
    """The default of `bits`, told from the same number where a caller gives the number."""


TERNARY_BITS = 2
"""Bits that a code of three levels is stored in, and counts as."""

DYNAMIC_BITS = 8
"""Bits of activations whose ranges are known at run time alone: integer kernels have one width for these."""


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        bits: 2 to 16; 8 by default. Of kind "ternary": 2, which is the default there, and what the codes are stored in.
        symmetric: levels -(2^(bits-1) - 1) … 2^(bits-1) - 1 about 0; else 0 … 2^bits - 1 with a zero point.
        granularity: one step per tensor, per output channel, or per `group_size` input indices of each channel; of
            activations with ranges at run time also "token": one step per row of the last dim.
        group_size: input indices per step, for granularity "group".
        kind: "uniform" (a step, LSQ; with a zero point, LSQ+), "geta" (step and range; symmetric, per tensor), or
            "ternary" for weights: -s, 0 and s (TWN); not symmetric: -n, 0 and p (TTQ), stored as codes and a table.
            "mixed" for weights: uniform, and each output channel has a number of bits of its own, `bits` at most.
        observer: how the first range is read off data. "output": of the ranges that the others give, the one with the
            least error in the results of the ops that read the tensor; alone, and for weights, as "mse".
        learn_exponent: kind "geta" learns an exponent, too, so that levels need not be evenly spaced. Integer kernels
            can read weights so quantized, but no activations.
        dynamic: of activations: the range is that of the values at hand, at run time, and needs no data. 8 bits; per
            tensor with a zero point, or per token, symmetric.
    """

    bits: int = _Default(8)
    symmetric: bool = True
    granularity: Granularity = "tensor"
    group_size: int = 0
    kind: Kind = "uniform"
    observer: Observer = "minmax"
    learn_exponent: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, _Default):
            object.__setattr__(self, "bits", TERNARY_BITS if self.kind == "ternary" else int(self.bits))
        check_bits(self.bits)
        for name, words in (("granularity", Granularity), ("kind", Kind), ("observer", Observer)):
            check_word(name, getattr(self, name), get_args(words))
        for name in ("symmetric", "learn_exponent", "dynamic"):
            check_flag(name, getattr(self, name))
        check_whole("group_size", self.group_size, 0)
        if (self.granularity == "group") != (self.group_size > 0):
            raise PlanError(
                f"granularity={self.granularity!r} with group_size={self.group_size}",
                why="group_size counts the input indices that share a step, and belongs to granularity 'group'",
                fix='QuantSpec(granularity="group", group_size=32)',
            )
        if self.kind == "geta" and (self.granularity != "tensor" or not self.symmetric):
            raise PlanError(
                "GETA's quantizer is symmetric and has one step per tensor",
                why=f"got granularity={self.granularity!r}, symmetric={self.symmetric}",
                fix='QuantSpec(kind="geta")',
            )
        if self.kind == "mixed" and (self.granularity != "channel" or not self.symmetric):
            raise PlanError(
                "bits of each channel's own must be of symmetric levels, with a step per channel",
                why=f"got granularity={self.granularity!r}, symmetric={self.symmetric}",
                fix='QuantSpec(kind="mixed", granularity="channel")',
            )
        if self.kind == "ternary":
            self._check_ternary()
        if self.dynamic or self.granularity == "token":
            self._check_dynamic()
        if self.learn_exponent and self.kind != "geta":
            raise PlanError(
                f"learn_exponent=True with kind={self.kind!r}",
                why="only GETA's quantizer has an exponent",
                fix='QuantSpec(kind="geta", learn_exponent=True)',
            )

    def _check_ternary(self) -> None:
        if self.bits != TERNARY_BITS or self.granularity == "group" or self.observer != "minmax":
            raise PlanError(
                "ternary weights must have 2 bits, granularity 'tensor' or 'channel', and no observer",
                why=f"got bits={self.bits}, granularity={self.granularity!r}, observer={self.observer!r}; thresholds "
                "and scales follow from the mean magnitude",
                fix='QuantSpec(kind="ternary", granularity="channel")',
            )

    def _check_dynamic(self) -> None:
        """Raise PlanError where no kernel has such ranges at run time."""
        forms = (("tensor", False), ("token", True))
        same = (self.bits, self.kind, self.observer) == (DYNAMIC_BITS, "uniform", "minmax")
        if not self.dynamic or not same or (self.granularity, self.symmetric) not in forms:
            raise PlanError(
                "ranges at run time must have 8 bits, per tensor with a zero point or per token and symmetric",
                why=f"got bits={self.bits}, granularity={self.granularity!r}, symmetric={self.symmetric}, "
                f"kind={self.kind!r}, observer={self.observer!r}, dynamic={self.dynamic}",
                fix='QuantSpec(symmetric=False, dynamic=True), or QuantSpec(granularity="token", dynamic=True)',
            )

    @property
    def tabled(self) -> bool:
        """Whether codes stand for values of a table, not for multiples of a step."""
        return self.kind == "ternary" and not self.symmetric

    @property
    def quant_min(self) -> int:
        """The lowest code."""
        if self.kind == "ternary":
            return -1
        return 1 - (1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def quant_max(self) -> int:
        """The highest code."""
        if self.kind == "ternary":
            return 1
        return (1 << (self.bits - 1 if self.symmetric else self.bits)) - 1


def check_bits(bits: Any, name: str = "bits") -> int:
    """Return `bits`, the argument called `name`. Raise PlanError unless it is a whole number from 2 to 16."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise PlanError(
            f"{name}={bits!r} is not a whole number from {MIN_BITS} to {MAX_BITS}",
            why="one bit leaves no symmetric level but 0, and above 16 nothing is gained over float16",
            fix=f"{name}=8",
        )
    return bits


WEIGHTS = QuantSpec(8, symmetric=True, granularity="channel")
ACTIVATIONS = QuantSpec(8, symmetric=False)
TABLES = QuantSpec(8, symmetric=True, granularity="channel")
DYNAMIC = QuantSpec(8, symmetric=False, dynamic=True)
PER_TOKEN = QuantSpec(8, granularity="token", dynamic=True)


@dataclass(frozen=True)
class QuantConfig:
    """Which tensors are quantized, and how.

    Attributes:
        weights: for weights of convolutions, linear layers and matrix products; None leaves them float.
        activations: for what those ops read, and for what convolutions return; None: weights only.
        embeddings: for embedding tables, which are stored as integers and looked up; None leaves them float.
        first_and_last_bits: the first and the last quantized layer get at least this many bits, unless an override
            names them. Their weights are not ternary then, but uniform.
        overrides: module name, or "re:" pattern -> (weights, activations) of the ops inside; (None, None) leaves them
            float, and what they read. The last that matches counts. An op that is named reads activations of its own
            spec, whatever the op that makes them and other readers ask for.
        share_concat: inputs and result of a concatenation get one common scale, so that an integer kernel only copies.
        share_add: the same for the two sides of an addition, for runtimes whose integer addition does not rescale.
        attention: write `scaled_dot_product_attention` out, so that its two products are quantized too.
    """

    weights: QuantSpec | None = WEIGHTS
    activations: QuantSpec | None = ACTIVATIONS
    embeddings: QuantSpec | None = TABLES
    first_and_last_bits: int = 8
    residual_bits: int = 8
    overrides: Mapping[str, tuple[QuantSpec | None, QuantSpec | None]] = field(default_factory=dict)
    share_concat: bool = False
    share_add: bool = False
    attention: bool = False

    def __post_init__(self) -> None:
        for name in ("weights", "activations", "embeddings"):
            _check_spec(name, getattr(self, name))
        _check_of_weights("activations", self.activations)
        for name in ("weights", "embeddings"):
            _check_static(name, getattr(self, name))
        if self.embeddings is not None and self.embeddings.tabled:
            raise PlanError(
                "ternary embeddings must be symmetric, got symmetric=False",
                why="rows are looked up as integers with a scale",
                fix='QuantConfig(embeddings=QuantSpec(kind="ternary"))',
            )
        check_bits(self.first_and_last_bits, "first_and_last_bits")
        check_bits(self.residual_bits, "residual_bits")
        for name in ("share_concat", "share_add", "attention"):
            check_flag(name, getattr(self, name))
        fix = 'overrides={"layer1": (QuantSpec(4), None)}'
        check_mapping("overrides", self.overrides, fix)
        as_names("overrides", list(self.overrides), fix)
        for key, specs in self.overrides.items():
            if not isinstance(specs, (tuple, list)) or len(specs) != 2:
                raise wrong(f"overrides[{shown(key)}]", "a pair (weights, activations)", specs, fix)
            for spec in specs:
                _check_spec(f"overrides[{shown(key)}]", spec)
            _check_of_weights(f"activations of overrides[{shown(key)}]", specs[1])
            _check_static(f"weights of overrides[{shown(key)}]", specs[0])

    @property
    def reads_ranges(self) -> bool:
        """Whether ranges of activations are read off data."""
        return any(spec is not None and not spec.dynamic for spec in self._of_activations())

    @property
    def dynamic(self) -> bool:
        """Whether activations have ranges at run time."""
        return any(spec is not None and spec.dynamic for spec in self._of_activations())

    def _of_activations(self) -> tuple[QuantSpec | None, ...]:
        return (self.activations, *(activations for _, activations in self.overrides.values()))

    def specs(self, module_path: str) -> tuple[QuantSpec | None, QuantSpec | None]:
        """The specs of weights and activations for an op that the module at `module_path` makes."""
        name = self.override(module_path)
        return (self.weights, self.activations) if name is None else self.overrides[name]

    def override(self, module_path: str) -> str | None:
        """Return the entry of `overrides` that counts for the module at `module_path`; None without one."""
        return next((name for name in reversed(list(self.overrides)) if matches(name, module_path)), None)


def matches(name: str, module_path: str) -> bool:
    """Whether `module_path` is, or lies in, the module `name`; or the pattern after "re:" is found in it."""
    if name.startswith("re:"):
        return re.search(name.removeprefix("re:"), module_path) is not None
    return module_path == name or module_path.startswith(name + ".")


def _check_spec(name: str, spec: object) -> None:
    """Refuse what is neither a QuantSpec nor None.

    Raises:
        PlanError: `spec` is something else.
    """
    if spec is not None:
        check_instance(name, spec, QuantSpec, f"{name.partition('[')[0]}=graphcomp.QuantSpec(8), or None for floats")


def _check_of_weights(name: str, spec: QuantSpec | None) -> None:
    """Raise PlanError where a spec of activations is one for weights alone."""
    if spec is not None and spec.kind == "mixed":
        raise PlanError(
            f"{name} cannot have bits of each channel's own",
            why="integer kernels read activations of one scale",
            fix='QuantConfig(weights=QuantSpec(kind="mixed", granularity="channel")), with other activations',
        )
    if spec is not None and spec.kind == "ternary":
        raise PlanError(
            f"{name} cannot be ternary",
            why="thresholds and scales follow from the values of a weight",
            fix='QuantConfig(weights=QuantSpec(kind="ternary")), with activations=None or as by default',
        )


def _check_static(name: str, spec: QuantSpec | None) -> None:
    """Raise PlanError where a spec of constants has ranges at run time."""
    if spec is not None and spec.dynamic:
        raise PlanError(
            f"{name} cannot have ranges at run time, got dynamic=True",
            why="the values are constant",
            fix="QuantConfig(weights=QuantSpec(8), activations=QuantSpec(symmetric=False, dynamic=True))",
        )


@overload
def with_bits(spec: QuantSpec, bits: int) -> QuantSpec: ...
@overload
def with_bits(spec: None, bits: int) -> None: ...
@overload
def with_bits(spec: QuantSpec | None, bits: int) -> QuantSpec | None: ...
def with_bits(spec: QuantSpec | None, bits: int) -> QuantSpec | None:
    """The same spec with other bits; a ternary one with more than two becomes uniform."""
    if spec is None:
        return None
    ternary = spec.kind == "ternary" and bits != TERNARY_BITS
    return replace(spec, bits=bits, kind="uniform" if ternary else spec.kind)
