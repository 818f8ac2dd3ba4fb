"""CompressedModel.export(cache=True): a decoder and its cache as one ONNX file, compared with the model in steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphcomp.capture.capture import Captured, capture
from graphcomp.errors import CaptureError, ExportError, first_line
from graphcomp.ir.module import names_quoted
from graphcomp.ir.preserve import eval_copy
from graphcomp.ir.program import Program
from graphcomp.native.integers import quantized_tensors
from graphcomp.native.lowered import in_floats, lowered_again
from graphcomp.quantization.lower import CLIPS
from graphcomp.system.files import replacing
from graphcomp.targets.decoder import Decoder, decoder_of, mask_of, positions_of
from graphcomp.targets.genai import config_of, write_genai
from graphcomp.targets.lengths import Lengths
from graphcomp.targets.onnxruntime.export import export_onnx
from graphcomp.targets.onnxruntime.kernels import prove
from graphcomp.targets.onnxruntime.speed import measured
from graphcomp.targets.runtime import Agreement, compare, largest_distance, open_session, output_steps
from graphcomp.targets.write import LONGER, SATURATED, ExportReport, check_dtypes, warn_of_kernels

log = logging.getLogger("graphcomp.export")

PIECES = (6, 4, 1)
"""Tokens of the runs that a file is compared with its model on: a prompt, a second piece of the prompt, one token."""


@names_quoted()
def write_decoder(
    model: nn.Module, path: Path, tokens: Tensor | None = None, *, measure: bool = True, genai: bool = False
) -> ExportReport:
    """Write a decoder with its cache as one ONNX file, and compare the file with the model in steps on one cache.

    Args:
        model: of transformers; weights may be integers. Not modified.
        path: where to write. With `genai`, other files go beside it.
        tokens: (b, s) ids to run on; None: random ones.
        measure: time a file with layers on integers beside its float form.
        genai: also write what onnxruntime-genai reads.

    Raises:
        ExportError: the model is no decoder, or keeps something else than keys and values; the file cannot be written,
            does not run, or computes something else than the model.
    """
    decoder = decoder_of(model)
    check_dtypes(model, ())
    if genai:
        config_of(decoder, path.name)  # raises before anything takes time
    example = decoder.example(tokens)
    program = _program(decoder, example)
    graph = program.module
    with replacing(path) as fresh:
        export_onnx(
            graph, example, {}, fresh,
            input_names=decoder.input_names(), output_names=decoder.output_names(), lengths=_lengths(decoder, graph),
        )  # fmt: skip
        found = compare(fresh, graph, example)
        as_run = compare(fresh, graph, example, exact=False)
        _check_steps(decoder, model, graph, fresh, tokens, found)
        proof = prove(fresh, {name for name, parameter in graph.named_parameters() if parameter.dim() >= 2})
        speed, notes = None, program.notes
        if measure:
            try:
                speed = measured(fresh, proof, _one_token(decoder, example), {}, graph.meta.get(CLIPS))
            except ExportError as error:
                notes = (*notes, f"was not timed beside its float form: {error.why or error.what}")
        size = sum(made.stat().st_size for made in fresh.parent.iterdir())
        if genai:
            write_genai(decoder, fresh)
    warn_of_kernels(path, found, as_run, proof)
    if speed is not None:
        log.info("%s: %s", path.name, speed)
    open_ = tuple(dict.fromkeys(name for dims in decoder.input_lengths() for d, name in dims.items() if d))
    return ExportReport(str(path), "onnx", size, found, as_run, proof, notes, open_, speed)


def _program(decoder: Decoder, example: tuple[Tensor, ...]) -> Program:
    """Return the graph of a decoder, with integers where the class holds them.

    Raises:
        ExportError: export cannot follow the model.
    """
    more = [tuple(dims) for dims in decoder.input_lengths()]
    try:
        if quantized_tensors(decoder):
            program: Program = lowered_again(decoder, example, {}, more)
        else:
            program = capture(decoder, example, more=more)
    except CaptureError as error:
        raise ExportError(
            f"{type(decoder.model).__name__} cannot be exported with its cache",
            at=error.at,
            why=error.why or error.what,
            fix="small.export(path) without cache=",
        ) from error
    if isinstance(program, Captured) and program.producer != "export":
        raise ExportError(
            f"{type(decoder.model).__name__} cannot be exported with its cache",
            why=f"its graph holds for one length alone: {program.reason}",
            fix="small.export(path) without cache=",
        )
    return program


def _lengths(decoder: Decoder, graph: fx.GraphModule) -> Lengths:
    """Return the open lengths of a file by the names that its inputs have in the graph."""
    places = graph.graph.find_nodes(op="placeholder")
    named = {place.name: dims for place, dims in zip(places, decoder.input_lengths(), strict=True)}
    return Lengths(named, outputs=decoder.output_lengths())


def _one_token(decoder: Decoder, example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return inputs of one row and one token, behind the example's cache."""
    (ids, mask, *rest), first = example, int(decoder.positions)
    tokens = ids.shape[1] - 1
    given = (ids[1:, :1], mask[1:, : mask.shape[1] - tokens], *(t[1:, :1] for t in rest[:first]))
    return (*given, *(t[1:] for t in rest[first:]))


# ------------------------------------------------------------------------------------------------ comparing
def _check_steps(
    decoder: Decoder, model: nn.Module, graph: fx.GraphModule, path: Path, tokens: Tensor | None, found: Agreement
) -> None:
    """Run a prompt in two pieces, and one token behind, in the file and in the model, each on its own cache.

    Raises:
        ExportError: the outputs are apart by more than rounding explains.
    """
    ids = decoder.prompt(tokens)
    mask = mask_of(ids)
    expected = steps_of_model(decoder, model, ids, mask)
    actual = steps_of_file(decoder, path, ids, mask)
    seen = torch.cat([mask[:, :end].bool()[:, start:] for start, end in _ends()], 1)
    step = output_steps(graph, [expected])[0]
    off = largest_distance(expected[seen], actual[seen]) / step
    if off > max(SATURATED * found.steps, LONGER):
        raise ExportError(
            "the file computes other results than the model on one cache",
            why=f"{off:.3g} quantization steps off over a prompt of {PIECES[0]} and {PIECES[1]} tokens and one token",
            fix="small.export(path) without cache=, and please report the model",
        )


def _ends() -> list[tuple[int, int]]:
    found, end = [], 0
    for count in PIECES:
        found.append((end, end + count))
        end += count
    return found


def steps_of_model(decoder: Decoder, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the first outputs of a model on its own cache, piece by piece; where weights alone are integers, they are
    multiplied in float, as a file does."""
    weights = quantized_tensors(model)
    if weights and all(tensor.operand is None for tensor in weights.values()):
        model = in_floats(model)
    results, cache = [], None
    with eval_copy(model, real=True) as copied, torch.no_grad():
        for start, end in _ends():
            more = {"position_ids": positions_of(mask)[:, start:end]} if decoder.positions else {}
            given = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **more}
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            on_device = {name: tensor.to(device) for name, tensor in given.items()}
            found: Any = copied(**on_device, past_key_values=cache, use_cache=True, return_dict=True)
            cache = found["past_key_values"]
            results.append(found[decoder.output].cpu())
    return torch.cat(results, 1)


def steps_of_file(decoder: Decoder, path: Path, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the first outputs of a file on its own cache, piece by piece.

    Raises:
        ExportError: onnxruntime does not run the file.
    """
    session = open_session(path, exact=True)
    names = decoder.input_names()
    cache: Sequence[Any] = [tensor.numpy() for tensor in decoder.empty(ids.shape[0])]
    results = []
    for start, end in _ends():
        more = [positions_of(mask)[:, start:end].numpy()] if decoder.positions else []
        given = [ids[:, start:end].numpy(), mask[:, :end].numpy(), *more, *cache]
        try:
            result, *cache = session.run(None, dict(zip(names, given, strict=True)))
        except Exception as error:  # onnxruntime's exceptions have no public base class
            why = f"{type(error).__name__}: {first_line(error)}"
            raise ExportError(f"onnxruntime cannot run {path.name} on a cache of length {start}", why=why) from error
        results.append(torch.from_numpy(result))
    return torch.cat(results, 1)
