"""What config.json says of a model that was cut: data alone, read as if a stranger had written it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from graphcomp.checkpoint.integers import PARTS, Facts, are_facts
from graphcomp.errors import CheckpointError

FORMAT = 1
"""Version of the section that this version of graphcomp writes, and the newest that it reads."""

NEEDS = (
    'pip install graphcomp, and "import graphcomp" before from_pretrained: without it, sizes of weights do not match'
)
"""Sentence of the section for readers who have no graphcomp."""

DIMENSIONS = 8
"""Most dims of a tensor in a section."""

LARGEST = 2**40
"""Largest number in a section."""

GUARD = "guard"
"""Part of one weight of integers: an empty tensor under the name of the weight. A reader without graphcomp stops at its
size, where it would else fill all weights of integers with random numbers."""

PART_DTYPES = frozenset({"uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"})
"""Dtypes of parts of a weight of integers."""

Value: TypeAlias = int | tuple[int, ...] | None
"""Of an attribute: JSON has lists in place of tuples."""


@dataclass(frozen=True)
class Section:
    """How a model differs from the model that its config builds.

    Attributes:
        architecture: name of the class that was saved, whose names the other entries use.
        shapes: tensor -> its shape; None where the config builds a parameter and the model has none.
        attributes: (path of a module, name of its attribute) -> value, beyond what shapes say.
        without: paths of modules that the config builds and the model has no more, outermost alone.
        stored: buffers that the class recomputes, in the folder since the model has others.
        trimmed: path of a module -> class of a trimmed vocabulary that takes its place.
        integers: weight of integers -> its facts (`graphcomp.checkpoint.integers`); the folder has its parts.
        figures: name -> (before, after): parameters, multiply-accumulates.
        version: of the graphcomp that wrote the section.
    """

    architecture: str = ""
    shapes: Mapping[str, tuple[int, ...] | None] = field(default_factory=dict)
    attributes: Mapping[tuple[str, str], Value] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()
    trimmed: Mapping[str, str] = field(default_factory=dict)
    integers: Mapping[str, Facts] = field(default_factory=dict)
    figures: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    version: str = ""

    @property
    def plain(self) -> bool:
        """Whether the config alone builds the model, so that any reader of the config loads the folder."""
        return not (self.shapes or self.attributes or self.without or self.stored or self.trimmed or self.integers)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON holds. Shapes are texts, "128x256", so that a section stays short where JSON is indented."""
        return {
            "format": FORMAT,
            "graphcomp": self.version,
            "needs": NEEDS,
            "architecture": self.architecture,
            "shapes": {n: None if s is None else "x".join(map(str, s)) for n, s in self.shapes.items()},
            "attributes": {
                f"{path}:{name}": list(value) if isinstance(value, tuple) else value
                for (path, name), value in self.attributes.items()
            },
            "without": list(self.without),
            "stored": list(self.stored),
            "trimmed": dict(self.trimmed),
            "integers": {name: dict(facts) for name, facts in self.integers.items()},
            "figures": {name: list(pair) for name, pair in self.figures.items()},
        }

    @staticmethod
    def of(data: Mapping[str, Any]) -> Section:
        """Read a section.

        Raises:
            CheckpointError: a newer format; an entry that is missing, unknown or of another type.
        """
        version = data.get("format")
        if type(version) is not int or version < 1:
            raise damaged(f"format must be an int from 1, got {version!r:.50}")
        if version > FORMAT:
            raise CheckpointError(
                f"the folder was written by a newer graphcomp ({data.get('graphcomp', 'unknown')!s:.50})",
                why=f"the section in config.json has format {version}, and this version reads up to {FORMAT}",
                fix="pip install --upgrade graphcomp",
            )
        known = set(Section().to_dict())
        if wrong := sorted(map(str, set(data) - known - {"quant_method"})):
            raise damaged(f"unknown entry {wrong[0]!r:.80}")
        if lost := sorted(known - set(data)):
            raise damaged(f"no entry {lost[0]!r}")
        return Section(
            architecture=_text("architecture", data["architecture"]),
            shapes={_text("shapes", n): _shape(n, s) for n, s in _mapping(data, "shapes").items()},
            attributes={_site(site): _value(site, v) for site, v in _mapping(data, "attributes").items()},
            without=_texts(data, "without"),
            stored=_texts(data, "stored"),
            trimmed={_text("trimmed", p): _text("trimmed", c) for p, c in _mapping(data, "trimmed").items()},
            integers={_text("integers", n): _facts(n, f) for n, f in _mapping(data, "integers").items()},
            figures={_text("figures", n): _pair(n, p) for n, p in _mapping(data, "figures").items()},
            version=_text("graphcomp", data["graphcomp"]),
        )


def damaged(why: str) -> CheckpointError:
    """Return the error of a section that this version could not have written."""
    return CheckpointError(
        "graphcomp's section in config.json is damaged", why=why, fix="copy the folder again, or save the model again"
    )


# ------------------------------------------------------------------------------------------------ entries
def _text(entry: str, value: Any) -> str:
    if not isinstance(value, str):
        raise damaged(f"{entry} must hold texts, got {value!r:.80}")
    return value


def _texts(data: Mapping[str, Any], entry: str) -> tuple[str, ...]:
    if not isinstance(data[entry], (list, tuple)):
        raise damaged(f"{entry} must be a list, got {data[entry]!r:.80}")
    return tuple(_text(entry, value) for value in data[entry])


def _mapping(data: Mapping[str, Any], entry: str) -> Mapping[str, Any]:
    if not isinstance(data[entry], Mapping):
        raise damaged(f"{entry} must be an object, got {data[entry]!r:.80}")
    return data[entry]  # type: ignore[no-any-return]


def _shape(name: str, text: Any) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = _text(f"the shape of {name!r:.80}", text).split("x") if text != "" else []
    if len(parts) > DIMENSIONS or not all(part.isascii() and part.isdigit() and len(part) < 13 for part in parts):
        raise damaged(f"the shape of {name!r:.80} must be as 128x256, got {text!r:.80}")
    return tuple(map(int, parts))


def _site(text: str) -> tuple[str, str]:
    path, colon, name = _text("attributes", text).rpartition(":")
    words = name.split(".")  # a number in an object of settings has a dot in its name
    if not colon or len(words) > 2 or not all(w.isidentifier() and not w.startswith("__") for w in words):
        raise damaged(f"an attribute must be as path:name, got {text!r:.80}")
    return path, name


def _value(site: str, value: Any) -> Value:
    if value is None or _is_int(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, (list, tuple)) and len(value) <= DIMENSIONS and all(map(_is_int, value)):
        return tuple(value)
    raise damaged(f"{site!r:.80} must be an int, a list of ints or null, got {value!r:.80}")


def _facts(name: str, value: Any) -> Facts:
    """Return facts of a weight of integers, with dtypes and shapes of its parts."""
    parts = value.get("parts") if isinstance(value, Mapping) else None
    if not isinstance(parts, Mapping) or not set(PARTS[:3]) <= set(parts) <= {*PARTS, GUARD}:
        raise damaged(f"the integers of {name!r:.80} must have parts, got {parts!r:.80}")
    for kind in parts.values():
        if not (isinstance(kind, (list, tuple)) and len(kind) == 2 and kind[0] in PART_DTYPES and _is_shape(kind[1])):
            raise damaged(f"the parts of {name!r:.80} must have a dtype and a shape, got {kind!r:.80}")
    if not are_facts({key: entry for key, entry in value.items() if key != "parts"}):
        raise damaged(f"the integers of {name!r:.80} must have facts, got {value!r:.80}")
    return dict(value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= DIMENSIONS and all(_is_int(n) and n >= 0 for n in value)


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(_is_int, value)):
        raise damaged(f"the figure {name!r:.80} must be two ints, got {value!r:.80}")
    return value[0], value[1]


def _is_int(value: Any) -> bool:
    return type(value) is int and math.fabs(value) <= LARGEST
