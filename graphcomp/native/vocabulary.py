"""The user's own class on a trimmed vocabulary: embeddings and heads of torch's classes take and give the old ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcomp.errors import PlanError
from graphcomp.ir.graph import assign
from graphcomp.ir.module import copied, tensor_names
from graphcomp.native.model import Edit, NativeResult
from graphcomp.pruning.vocabulary import Kept, Logits, Table


class Trimmed:
    """A module on some ids alone, whose callers know the old ids.

    Attributes:
        vocabulary: the number of old ids.
    """

    vocabulary: int

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            PlanError: another number of ids, which the map from ids to rows does not know.
        """
        if name in ("num_embeddings", "out_features") and "vocabulary" in vars(self):
            raise PlanError(
                f"a {type(self).__name__} cannot get another number of rows",
                why="the map from ids to rows is of the vocabulary that was trimmed; the model is half resized now",
                fix="resize_token_embeddings of the whole model, and trim_vocabulary of that",
            )
        super().__setattr__(name, value)


def refused(error: IndexError, vocabulary: int) -> IndexError:
    """Return the error of an id without a row."""
    return IndexError(
        f"an id has no row: the vocabulary of {vocabulary} ids was trimmed, and only ids that stay have rows; "
        f"unknown= of trim_vocabulary reads all others as one ({error})"
    )


class OldIds(Trimmed):
    """In front of a class of embeddings with a forward of its own: maps the old ids to rows.

    Attributes:
        rows: (vocabulary,) int32, as those of TrimmedEmbedding.
        padding_idx: the row of the id for padding.
    """

    rows: Tensor
    whole: type[nn.Embedding]

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(…) integer ids -> what the class behind makes of their rows.

        Raises:
            IndexError: an id has no row.
        """
        try:
            return super().forward(self.rows[ids.long()], *args, **kwargs)  # type: ignore[misc]
        except IndexError as error:
            raise refused(error, self.vocabulary) from error

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A class that is made at run time has no name to be found by."""
        return _without_values, (self.whole,), vars(self)


def _without_values(whole: type[nn.Embedding]) -> nn.Module:
    kind = trimmed_class(whole)
    return kind.__new__(kind)


def trimmed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that stands for a class of embeddings, or for `nn.Linear`, on a trimmed vocabulary."""
    if kind not in TRIMMED:
        about = {"__doc__": f"{kind.__name__}, called with old ids.", "whole": kind}
        TRIMMED[kind] = type("TrimmedEmbedding", (OldIds, kind), about)
    return TRIMMED[kind]


class TrimmedEmbedding(Trimmed, nn.Embedding):
    """An embedding with rows for some ids alone, called with the old ids.

    Attributes:
        rows: (vocabulary,) int32, the row of each id. Ids without a row have the number behind the last row, so that a
            lookup refuses them.
        padding_idx: the old id.
        padding_row: its row.
    """

    rows: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        vocabulary: int,
        padding_idx: int | None = None,
        padding_row: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_row, **options)
        self.vocabulary, self.padding_idx, self.padding_row = vocabulary, padding_idx, padding_row
        rows = torch.arange(vocabulary, dtype=torch.int32, device=self.weight.device)
        self.register_buffer("rows", rows.clamp(max=num_embeddings))

    def forward(self, ids: Tensor) -> Tensor:
        """(…) integer ids -> (…, embedding_dim).

        Raises:
            IndexError: an id has no row.
        """
        try:
            return F.embedding(
                self.rows[ids.long()], self.weight, self.padding_row, self.max_norm, self.norm_type,
                self.scale_grad_by_freq, self.sparse,
            )  # fmt: skip
        except IndexError as error:
            raise refused(error, self.vocabulary) from error

    def extra_repr(self) -> str:
        """As torch's, with the number of ids."""
        return f"{super().extra_repr()}, vocabulary={self.vocabulary}"


class TrimmedLinear(Trimmed, nn.Linear):
    """A head with logits for some ids alone, which stand in their old columns; the others are -inf.

    Attributes:
        columns: (vocabulary,) int32, the output of each id; `out_features` for ids that are gone.
    """

    columns: Tensor

    def __init__(self, in_features: int, out_features: int, vocabulary: int, bias: bool = True, **options: Any) -> None:
        super().__init__(in_features, out_features, bias, **options)
        self.vocabulary = vocabulary
        columns = torch.arange(vocabulary, dtype=torch.int32, device=self.weight.device)
        self.register_buffer("columns", columns.clamp(max=out_features))

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, vocabulary)."""
        logits = super().forward(input)
        gone = torch.full_like(logits[..., :1], -torch.inf)
        return torch.cat([logits, gone], -1).index_select(-1, self.columns)

    def extra_repr(self) -> str:
        """As torch's, with the number of ids."""
        return f"{super().extra_repr()}, vocabulary={self.vocabulary}"


TRIMMED: dict[type[nn.Module], type[nn.Module]] = {nn.Embedding: TrimmedEmbedding, nn.Linear: TrimmedLinear}
"""Class -> the class in its place; classes of embeddings with a forward of their own are added as they are met."""

NAMES = frozenset({"TrimmedEmbedding", "TrimmedLinear"})
"""Names of classes of a trimmed vocabulary, in files."""


def can_become(module: nn.Module, name: str) -> bool:
    """Return whether a module can become one of the named class of a trimmed vocabulary."""
    if isinstance(module, Trimmed) or name not in NAMES:
        return False
    return isinstance(module, nn.Embedding) if name == "TrimmedEmbedding" else type(module) is nn.Linear


def trim_as(model: nn.Module, classes: Mapping[str, str]) -> None:
    """Let embeddings and heads become those of a trimmed vocabulary where `classes`, path -> name, says so, in place.

    What they hold is still to be filled in.
    """
    for path, module in list(model.named_modules()):
        if can_become(module, classes.get(path, "")):
            become_trimmed(module, 0, torch.empty(0, dtype=torch.int32))


def become_trimmed(module: nn.Module, vocabulary: int, buffer: Tensor) -> None:
    """Let an embedding, or a linear layer of torch's class, become one of a trimmed vocabulary, in place."""
    module.__class__ = trimmed_class(type(module))
    module.register_buffer("rows" if isinstance(module, nn.Embedding) else "columns", buffer)
    vars(module)["vocabulary"] = vocabulary
    if type(module) is TrimmedEmbedding:
        vars(module)["padding_row"] = None


def trimmed_model(
    model: nn.Module, names: Mapping[str, Sequence[str]], tables: Sequence[Table], kept: Kept, logits: Logits
) -> NativeResult:
    """Return a copy of the model with fewer rows, or why there is none; the copy is still to be verified.

    Args:
        names: name of a tensor -> all names that the model has for it.
        tables: of the captured graph.
    """
    try:
        small = copied(model, share=True)
    except Exception as error:  # a class may refuse to be copied in any way
        return NativeResult(None, f"the model cannot be copied: {type(error).__name__}")
    held = tensor_names(model)
    lookups = {name for table in tables for name in names.get(table.name, (table.name,))}
    heads = {n for table in tables for head in table.heads for n in names.get(head.weight, (head.weight,))}
    biases = {n for table in tables for head in table.heads if head.bias for n in names.get(head.bias, (head.bias,))}
    lost = sorted((lookups | heads | biases) - set(held))
    if lost:
        return NativeResult(None, f"the model holds no tensor named {lost[0]!r}")
    new: dict[int, Tensor] = {}
    for name, tensor in held.items():
        if id(tensor) not in new:
            cut = name in lookups | heads | biases
            data = tensor.detach()
            data = data.index_select(0, kept.ids.to(tensor.device)) if cut else data.clone()
            new[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
        assign(small, name, new[id(tensor)])
    maps: dict[str, Tensor] = {}
    edits: list[Edit] = []
    for path, module in list(small.named_modules()):
        name, kind = f"{path}.weight".lstrip("."), type(module)
        if isinstance(module, nn.Embedding) and name in lookups:
            if isinstance(module, Trimmed):
                return NativeResult(None, f"'{path}' is trimmed already")
            padding = module.padding_idx
            row = None if padding is None else int(kept.columns[padding])
            become_trimmed(module, kept.size, _on(maps, "rows", kept.rows, module.weight))
            found: dict[str, Any] = {
                "num_embeddings": len(kept.ids),
                "vocabulary": kept.size,
                "padding_row" if kind is nn.Embedding else "padding_idx": row,
            }
        elif isinstance(module, nn.Linear) and name in heads:
            found = {"out_features": len(kept.ids)}
            if logits == "wide":
                if kind is not nn.Linear:
                    return NativeResult(None, f"'{path}' is a {kind.__name__}, whose own forward gives narrow logits")
                same = torch.equal(kept.rows, kept.columns)
                columns = _on(maps, "rows" if same else "columns", kept.columns, module.weight)
                become_trimmed(module, kept.size, columns)
                found["vocabulary"] = kept.size
        else:
            continue
        vars(module).update(found)
        edits += [(path, attribute, given) for attribute, given in found.items()]
    return NativeResult(small, edits=tuple(edits))


def _on(maps: dict[str, Tensor], name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Return one tensor for all modules, on the device of `like`."""
    return maps.setdefault(name, tensor.to(like.device))
