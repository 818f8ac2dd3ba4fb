"""CompressedModel: what compression returns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from graphcomp.errors import NotBuiltError
from graphcomp.quantization.ptq import Quantized
from graphcomp.report import Report

Form = Literal["native", "graph"]


class CompressedModel(nn.Module):
    """A smaller model, called like the original.

    Attributes:
        module: the user's own class where that could be verified (`form` "native"), else the sliced graph ("graph").
        kept: parameter or buffer name -> dim -> the indices that were kept ((k,) int64), sliced dims only.
        report: what was removed, what it saves, what was verified.
        reason: for "graph", why it is not the user's class; else "".
        quantized: the float, fake-quant and integer graphs of a model that was quantized; None otherwise, and after
            `load`.
        edits: Python attributes of the user's class that were corrected, as (module path, attribute, value).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        form: Form,
        kept: Mapping[str, Mapping[int, Tensor]],
        report: Report | Mapping[str, Any],
        reason: str = "",
        edits: tuple[tuple[str, str, Any], ...] = (),
        original_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.form: Form = form
        self.kept = {name: dict(dims) for name, dims in kept.items()}
        self.report = report
        self.reason = reason
        self.edits = edits
        self.original_shapes = dict(original_shapes or {})
        self.quantized: Quantized | None = None
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original model's."""
        return self.module(*args, **kwargs)

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint folder that `graphcomp.load` rebuilds without the original weights.

        Raises:
            CheckpointError: the folder holds something else, or cannot be written.
        """
        from graphcomp.export.checkpoint import save

        save(self, folder)

    def export(self, path: str | Path) -> None:
        """Write the model for another runtime, chosen by the suffix; a path without suffix is a checkpoint folder.

        Raises:
            NotBuiltError: `.onnx` and `.pt2` come with quantization.
        """
        path = Path(path)
        if path.suffix in (".onnx", ".pt2"):
            raise NotBuiltError(
                f"export to {path.suffix} is not built yet",
                fix="torch.onnx.export(small.module, …, dynamo=True) or torch.export.export(small.module, …)",
            )
        self.save(path)
