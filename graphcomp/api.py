"""The public functions: thin, reading like the pipeline capture -> couple -> score -> allocate -> slice -> verify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from graphcomp.arguments import check_instance, wrong
from graphcomp.capture.capture import Captured, blaming_inputs, capture, example_arguments, scoped
from graphcomp.cost.latency_table import LatencyTable
from graphcomp.coupling.analysis import Analysis, analyze_captured
from graphcomp.coupling.groups import ChannelGroup, Kept
from graphcomp.errors import CalibrationError, CaptureError, InputError, NothingToPrune, PlanError
from graphcomp.flows.choosing import by_sensitivity, check_rounds
from graphcomp.flows.depth import blocks_of, chosen_blocks, without_blocks
from graphcomp.flows.depth_first import (
    DEFAULT,
    Split,
    check_units_asked,
    joined,
    paths_without,
    renamed,
    split_goal,
)
from graphcomp.flows.family import MemberBudget, Once, shared_by
from graphcomp.flows.finalize import as_trained
from graphcomp.flows.finetuned import inputs_of, trainable, with_values
from graphcomp.flows.held import equal_counts, held_by_class, held_choice, other_units
from graphcomp.flows.kept_class import asks_for_class, integers_in_class, refuse_graph
from graphcomp.flows.mixed import check_bit_budget, choose_layer_bits
from graphcomp.flows.one_shot import cut_groups, cut_to_integers
from graphcomp.flows.repaired import as_batches, checked_samples, cut_again, flat_batches, repaired
from graphcomp.flows.results import (
    Activations,
    as_integers,
    as_model,
    calibrating,
    check_batches,
    check_floats,
    check_second_call,
    group_sizes,
    planned_bits,
    planned_bytes,
    post_training,
    with_latency,
)
from graphcomp.flows.said_by_config import with_config
from graphcomp.flows.searched import Search, batches_to_search, check_untrained, without_training
from graphcomp.flows.timed import DESIGNS, time_plan
from graphcomp.flows.timed_budget import timed_budget
from graphcomp.flows.uniform import Uniform, alike_layers, check_uniform
from graphcomp.flows.unmet import unmet
from graphcomp.flows.vocabulary import trimmed
from graphcomp.flows.whole import into_whole
from graphcomp.ir.module import copied, tensor_leaves
from graphcomp.methods.base import Goal, Method
from graphcomp.methods.plain import Finetune
from graphcomp.methods.registry import stages_of
from graphcomp.methods.stages import Following, check_goals, folders, goals_of, least_steps
from graphcomp.methods.takes import ONE_SHOT, asked, check_taken
from graphcomp.pruning.allocation import Baseline, Budget, Scope, allocate_budget
from graphcomp.pruning.blocks import DEPTH, LAYER, Block, check_blocks_alone, checked_blocks
from graphcomp.pruning.evidence import arguments_like, notes_of
from graphcomp.pruning.multiples import in_multiples, with_fast_widths, with_group_sizes
from graphcomp.pruning.names import by_module_name, module_names, scope_name
from graphcomp.pruning.prunable import find_prunable
from graphcomp.pruning.saliency import Saliency, reads_data, score
from graphcomp.pruning.shares import allocate_parts, parts_of
from graphcomp.pruning.slice import as_kept, by_factor, check_groups
from graphcomp.pruning.vocabulary import Logits
from graphcomp.pruning.zeros import NAME as ZEROS
from graphcomp.pruning.zeros import check_alone, without_zeros
from graphcomp.quantization.ptq import PostTraining, Rounding
from graphcomp.quantization.spec import QuantConfig, check_bits, with_bits
from graphcomp.report.report import Report
from graphcomp.request import check_options
from graphcomp.result import CompressedModel
from graphcomp.system.progress import progress as show_progress
from graphcomp.training import distributed
from graphcomp.training.batches import first_batches, to_device
from graphcomp.training.loop import train
from graphcomp.training.options import Training, parts
from graphcomp.training.preparation import AsTheyAre, FromPostTraining, Quantizing, prepare_graph, training_config
from graphcomp.training.prepared import Prepared, unwrapped
from graphcomp.training.ranges import LayerBits
from graphcomp.training.same_gradients import settle_gradients
from graphcomp.training.shrink import shrunk
from graphcomp.training.whole import standing_in

Modules: TypeAlias = str | nn.Module | Sequence[str | nn.Module]
"""Modules of a model: a name, a "re:" pattern, a module itself, or several of these."""


def analyze(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    scope: str | nn.Module = "",
    outputs: str | Sequence[str] | None = None,
) -> Analysis:
    """Find which channels, heads and features of `model` live or die together, and which must stay, and why.

    Args:
        model: any module that runs on the example inputs; on the meta device too. Not modified.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword tensors.
        example_kwargs: keywords added to a tuple.
        scope: analyse only this submodule, on the inputs it gets when `model` runs.
        outputs: names of the outputs that matter (default: all); the others freeze nothing and are dropped.

    Returns:
        Analysis with .groups, .frozen, .unknown_ops, .report(), .to_networkx().

    Raises:
        CaptureError, InputError: the model cannot be followed, or does not run on the inputs.
    """
    check_options(example_kwargs=example_kwargs, outputs=outputs)
    scope = _scope(model, scope)
    return analyze_captured(capture(model, example_inputs, example_kwargs, scope=scope, outputs=outputs))


def compress(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    sparsity: float | Mapping[Any, float] | None = None,
    bits: int | tuple[int, int] | None = None,
    activation_bits: int | tuple[int, int] | Literal["same"] | None = "same",
    activations: Activations = "static",
    group_size: int = 0,
    calibration: Iterable[Any] | None = None,
    rounding: Rounding = "nearest",
    reduce_range: bool = False,
    quantization: PostTraining | None = None,
    method: str | Method | Sequence[str | Method] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Tensor] | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    folder: str | Path | None = None,
    training: Training | None = None,
    saliency: str | Saliency | None = None,
    ranking: Scope = "global",
    rounds: int = 1,
    repair: Literal["least_squares"] | None = "least_squares",
    ignore: Modules = (),
    keep_inputs: Modules = (),
    prune: Sequence[str] | None = None,
    round_to: int = 1,
    budget: Budget | None = None,
    prefer_native: bool = True,
    uniform: bool = False,
    keep_class: bool | None = None,
    scope: str | nn.Module = "",
    outputs: str | Sequence[str] | None = None,
    verify: bool = True,
    measure_latency: bool = False,
    progress: bool = True,
    seed: int = 0,
) -> CompressedModel:
    """Return a physically smaller copy of `model` that computes what the masked original computes.

    Args:
        model: not modified.
        example_inputs: a tensor, a tuple, or a dict of keyword tensors; `example_kwargs` adds keywords to a tuple.
        sparsity: fraction of the prunable units (channels, heads, features) to remove, 0 <= sparsity < 1; met to the
            nearest whole unit. Or fractions by module, {"layer1": 0.2, "re:conv": 0.5}: each of the units that the
            modules make which the name or pattern matches, the last match counting; other modules keep their width.
            Default: 0.5, where the method prunes.
        bits: of weights and activations, 2 to 16; None: no quantization. One-shot, the first and the last layer get 8
            at least. Or a range, (4, 8): each layer ends with bits of its own. In training they are learned. One-shot
            they are chosen within `budget`, on bytes or bit operations, by the error that each layer's rounding makes
            in the outputs; units go by `sparsity` then, by default none.
        activation_bits: where they differ from `bits`, in training also a range; None: weights only, activations stay
            float.
        activations: "static": ranges of activations are read off data. "dynamic": ranges are those of the values at
            hand, at run time, one per tensor: no data are needed, linear layers and products with a matrix run on int8
            kernels in PyTorch and onnxruntime, and all other layers read floats. What is computed for one sample then
            depends on the batch; "dynamic_per_token": not, as each row of the last dim has a range of its own.
        group_size: so many input indices of a weight share a step; 0: one step per output channel. Widths that pruning
            leaves are multiples of it, so that all groups are whole.
        calibration: batches in the form of the example inputs (of the whole model, with a scope too), off which the
            ranges of activations are read. Without it they are read off the example inputs, and the report says so.
            Saliencies that read activations take these batches where there is no `data`.
        rounding: of weights: "nearest", or "second_order" (GPTQ), which needs calibration data: some hundred samples
            are better than nearest at four bits and fewer. Or "reconstruct", or `Reconstruction(steps=, seconds=)`:
            from second-order rounding on, rounding, biases and steps are learned block by block and then together,
            which takes minutes; what does not help on samples held out stays, see `report.reconstructions`.
        reduce_range: weights of 7 bits at most, the first and last layer included, stored as int8: for x86 CPUs without
            VNNI, where onnxruntime's fast kernels add products in 16 bits and saturate.
        quantization: all options of post-training quantization at once, in place of the seven above.
        method: "oneshot": score, cut, done. Or by training: "geta", jointly pruned and quantized; "hesso", pruned only;
            "qat", quantized only; "sequential", pruned first and quantized then, in half of the steps each. Default:
            "geta" where `data`, `loss` and a length of training are given, else "oneshot". "qat" takes all options of
            quantization that "oneshot" takes, and trains by LSQ and LSQ+ from what post-training quantization gives;
            where that does not lower the loss (see `Training.held_out`), it returns what it began with. With a range of
            bits, "qat" trains GETA's quantizers, which learn their bits.
        data: batches to train on, or for saliencies that need them. Each is a tensor, a tuple that begins with the
            model's positional inputs, or a dict that holds its keyword inputs; labels may follow. For training they
            are gone over several times: a DataLoader, a list, … Of several processes (`torch.distributed`, torchrun)
            each gives its share, as a DataLoader with a DistributedSampler does; all return the same model.
        loss: loss(model output, batch) -> scalar, for training, or for saliencies that need gradients. With
            `Training(teacher=model)` it may be left out: the teacher's outputs alone are learned then.
        epochs, steps, lr, folder: of the training; see `Training`. With a folder, a run that was cut short goes on when
            it is called again.
        training: all options of training at once, in place of the four above.
        saliency: how units are ranked; see `graphcomp.pruning.saliency`. Default: "l2", in training "geta". Or
            "zeros": no ranking, exactly the units go that are zero already and leave the outputs as they are.
        ranking: "global" ranks all units together, by scores relative to those of their group; "local" removes the same
            share of every group; "sensitivity" measures for each group how far the outputs move where a share of its
            units goes and the layers behind are repaired: it takes a while, keeps most, and needs calibration or data.
            Without a saliency, units of a group go in the order of "repairable".
        rounds: with ranking="sensitivity", the goal is reached in so many rounds: after each, what is left is repaired
            and measured again.
        repair: "least_squares": in one shot, with calibration or data, each layer that reads what the cut changed gets
            the weights that best restore its output, without labels (see `graphcomp.repair`). With bits and
            calibration, each quantized layer, too, before its weights are rounded, and steps are searched: see
            `report.quantization_repairs`; method="qat" begins with these weights. None: the weights that stay are as
            they were.
        ignore: modules that keep their output width and stay float: names, "re:" patterns, or the modules themselves.
            What they read may get narrower.
        keep_inputs: modules, named likewise, that keep their input width and their output width.
        prune: roles to prune, of "channel", "head", "head_dim", "hidden", "width", "expert", "group". Default: all,
            but for "head_dim" (queries and values would get heads of different sizes, which hardly any class of
            model can hold), "group" (the groups of group norms and grouped convolutions, and the query heads of each
            key head: what they divide is cut already) and "width" in groups that layer, RMS or group norms take
            statistics over. Or "block": whole residual blocks go, chosen by the
            error that the outputs are left with once the layer in front of the block makes up for it; `sparsity` is
            the share of the blocks (see `find_blocks`), a budget is met with as few as possible, and calibration or
            data are needed. "layer": the blocks that one item of a list of modules makes go together, which the
            model's class can hold. Beside other roles, bits or training, ("layer", "hidden"), the blocks go first, in
            one shot, and all else is done to the model that is left, whose modules the report names: a number is then
            the share of each, of the blocks and of the units that are left; shares by role,
            {"layer": 0.25, "hidden": 0.5}, differ, and without a budget a role that the mapping does not name is left
            alone; of a budget blocks take half (the geometric mean of the original
            cost and the limit), or their share where `sparsity` has one, {"layer": 0.25}, and units the rest.
        round_to: the lengths of the dims that are cut are multiples of it (a head of 32 dims is one of 8 by itself).
            The sparsity is then met to the nearest number of units that is possible, and the report says so.
        budget: a target on parameters, MACs, bit operations, bytes or latency instead of `sparsity`. Bit operations
            count the bits that the layers are quantized to. Of latency, the layers are timed on this machine at several
            widths (see `time_layers`), and the result is timed beside the original. In training, see `QASSO`.
        prefer_native: where the model's class can hold some lengths only as long as they are equal (the parts of one
            `chunk`, two lengths in one attribute), keep equally many units of these groups, at the same sparsity. Which
            units stay is chosen group by group; the report names the groups. Without a budget, a few groups that the
            class cannot hold cut at all (heads of `nn.MultiheadAttention`) stay whole and others give as many units,
            with a note. False: every group by its scores alone. One-shot, and where the result is of the class: see
            `keep_class`.
        uniform: keep equally many units in alike layers, and cut alone what the model's config (of transformers) has an
            entry for: heads, key heads, widths of feed-forward layers, experts. The config is rewritten, so that
            `small.module.save_pretrained(folder)` is read without graphcomp, by all that reads configs; the report says
            which entries, what is left whole for want of one, and why, where the config cannot build the result. One
            shot, of whole models in floats.
        keep_class: what quantizing in one shot returns. True: the model's own class with weights of integers, which
            `generate`, `save_pretrained` and adapters work on; for quantized weights, and 8-bit activations at run
            time, of matrices and tables. False: a graph. None: the class for models of transformers where it can hold
            the integers, else a graph, and the report says why. In floats, the result is of the class either way.
        scope: compress one submodule; the result holds the whole model with that part replaced. In training the loss is
            of the whole model's output, and all its parameters are trained: `requires_grad_(False)` holds those that
            are not to move.
        outputs: names of the outputs that matter.
        verify: check on the example inputs that sliced equals masked; the error stands in the report. (That the
            user's class equals the sliced graph is always checked: an unverified one is never returned.)
        measure_latency: time the model before and after (one thread, milliseconds).
        progress: show a progress line on the terminal (silent elsewhere).
        seed: of random saliency, and of all that is drawn in training.

    Raises:
        NothingToPrune: every axis is frozen; the message says why.
        PlanError, BudgetError: arguments that cannot be met; the message says what can.
        VerificationError: the result does not compute what it should. Nothing is returned then.
        CalibrationError: calibration data that do not fit, or are not finite.
        TrainingError: the loss is not finite, or the data hold too few batches.
        CheckpointError: the folder is of another run, or cannot be written or read.
    """
    options = dict(locals())
    check_options(
        example_kwargs=example_kwargs, sparsity=sparsity, activation_bits=activation_bits, activations=activations,
        group_size=group_size, rounding=rounding, reduce_range=reduce_range, quantization=quantization, method=method,
        data=data, loss=loss, folder=folder, training=training, saliency=saliency, ranking=ranking, rounds=rounds,
        repair=repair,
        prune=prune, round_to=round_to, budget=budget, prefer_native=prefer_native,
        keep_class=keep_class, outputs=outputs, verify=verify,
        measure_latency=measure_latency, progress=progress, seed=seed, uniform=uniform,
    )  # fmt: skip
    scope = _scope(model, scope)
    part = _submodule(model, scope)
    ignore, keep_inputs = module_names(part, ignore, "ignore"), module_names(part, keep_inputs, "keep_inputs")
    progress = progress and distributed.rank() == 0
    training = _training(training, epochs=epochs, steps=steps, lr=lr, folder=folder)
    if method is None:
        learns = loss is not None or (training is not None and training.teacher is not None)
        method = "geta" if data is not None and learns and training is not None else "oneshot"
        _check_length(data, loss, training, saliency)
    if isinstance(data, Tensor):
        _check_stacked(data, example_inputs)
    title, stages = stages_of(method)
    zeros = saliency == ZEROS
    if zeros:
        check_alone({
            "sparsity": sparsity is not None, "budget": budget is not None, "method": bool(stages),
            "ranking": ranking != "global", "rounds": rounds > 1,
        })  # fmt: skip
    given = {
        "sparsity by module": isinstance(sparsity, Mapping), "budget": budget, "saliency": saliency,
        "round_to": round_to, "prune": prune, "keep_inputs": keep_inputs, "ranking": ranking,
        "rounds": rounds, "uniform": uniform,
        "prefer_native": prefer_native, "keep_class": keep_class,
        "activation_bits": activation_bits, "activations": activations,
        "calibration": calibration,
        "group_size": group_size, "rounding": rounding, "reduce_range": reduce_range, "quantization": quantization,
    }  # fmt: skip
    depth = prune is not None and bool(set(prune) & set(DEPTH))
    if depth and (stages or bits is not None or quantization is not None or set(prune or ()) - set(DEPTH)):
        return _depth_first(options, method, stages, scope, ignore, keep_inputs, asked(given))
    if stages:
        start = None
        calibrated = any(stage.calibrated for stage in stages)
        if calibrated and (quantization is not None or not (_is_range(bits) or _is_range(activation_bits))):
            start = _start(bits, activation_bits, group_size, rounding, reduce_range, quantization)
        _check_gradients(title)
        goal = Goal(
            sparsity=by_module_name(part, sparsity, "sparsity") if isinstance(sparsity, Mapping) else sparsity,
            budget=budget,
            bits=_limits(bits),
            activation_bits=activation_bits,
            saliency=saliency,
            round_to=round_to,
            prune=prune,
            ignore=tuple(ignore),
        )
        goals = goals_of(stages, goal, start and _with_names(start, part))
        remarks = check_goals(stages, title, goals, given)
        _activation_limits(bits if quantization is None else 8, activation_bits)
        searches = any(stage.searches for stage in stages)
        if calibration is not None and bits is None and start is None and not searches:
            raise PlanError(
                f"calibration with method={title!r}, and no bits are given",
                why="it gives quantizers their first ranges",
                fix="bits=(4, 8), or no calibration",
            )
        held_out = training is not None and training.held_out is not None
        compares = [
            stage.compares and (own.start is not None if stage.calibrated else held_out)
            for stage, own in zip(stages, goals, strict=True)
        ]
        _check_held_out(any(compares), training)
        alone = without_training(stages, training)
        if alone:
            check_untrained(training, title)
        if not alone and (data is None or training is None or (loss is None and training.teacher is None)):
            raise PlanError(
                f"method={title!r} trains: it needs data, a loss and a length",
                fix="data=loader, loss=lambda output, batch: …, epochs=10; a teacher (Training) may stand for the loss",
            )
        _check_weights(model, saliency)
        example = example_arguments(example_inputs, example_kwargs)
        trained_model = _own(model)
        measured: Sequence[Any] = ()
        if start is not None:
            measured, data = first_batches(() if data is None else data, seed)
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            calibration = [to_device(b, device) for b in measured] if calibration is None else calibration
        if training is not None and training.held_out is not None:
            measured = _held_out(training.held_out)
        judged: list[Any] = []
        if searches:
            calibration, judged, data = batches_to_search(calibration, data, seed)
        source = partial(
            _prepared,
            trained_model,
            repair=repair is not None and start is not None and any(compares),
            example_inputs=example_inputs,
            example_kwargs=example_kwargs,
            calibration=calibration,
            ignore=ignore,
            keep_inputs=keep_inputs,
            prune=prune,
            scope=scope,
            outputs=outputs,
        )
        training, given_data = training or Training(), () if data is None else data
        lengths = parts(training, given_data, folders(stages), least_steps(stages, goals, training), title)
        taught = [stage.taught(own, model) for stage, own in zip(stages, lengths, strict=True)]
        ready = _trained(
            trained_model,
            list(zip(stages, goals, taught, strict=True)),
            source,
            None if alone else partial(train, data=given_data, loss=loss, progress=progress, seed=seed),
            [measured if own else () for own in compares],
            Search(
                lambda plan: _calibration(trained_model, plan, example_inputs, example_kwargs, calibration) or [],
                judged,
                loss,
                repair is not None,
                seed,
            ),
            example=example,
            scope=scope,
            progress=progress,
        )
        ready.remarks = (*ready.remarks, *remarks)
        with show_progress(1, progress) as bar:
            bar.step("cutting, lowering and verifying")
            small = finalize(ready, verify=verify, measure_latency=measure_latency)
        assert isinstance(small.report, Report)
        small.report = replace(small.report, notes=(*small.report.notes, *unmet(stages, goals, ready, small.report)))
        if not scope:
            return small
        for trained, own in zip(trained_model.modules(), model.modules(), strict=True):
            trained.training = own.training
        return into_whole(trained_model, small, ready.session.plan.captured, example)
    _check_one_shot(activation_bits, training)
    if depth:
        assert prune is not None
        check_blocks_alone(prune, sparsity, budget, asked(given))
        share = sparsity if isinstance(sparsity, (int, float)) else DEFAULT
        analysis = analyze(model, example_inputs, example_kwargs, scope=scope, outputs=outputs)
        shown = first_batches(data, seed)[0] if calibration is None and data is not None else calibration
        shown_rows = _calibration(model, analysis, example_inputs, example_kwargs, shown)
        return _left_out(
            model, analysis, Split(prune[0], share, budget, {}), shown_rows, ignore, repair=repair, verify=verify,
            measure_latency=measure_latency, progress=progress,
            example=example_arguments(example_inputs, example_kwargs),
        )[0]  # fmt: skip
    limits = _range(bits) if isinstance(bits, (tuple, list)) else None
    if limits is not None:
        check_bit_budget(limits, budget)
    bit_budget, budget = (None, budget) if limits is None else (budget, None)
    if sparsity is not None and budget is not None:
        raise PlanError(
            f"sparsity={sparsity!r} beside a budget",
            why="in one shot a budget says how many units go; in training both can be met",
            fix="one of the two",
        )
    if quantization is not None:
        _check_alone(bits, activation_bits, group_size, rounding, reduce_range, activations)
    bits = bits if limits is None else limits[1]
    if calibration is not None and bits is None and quantization is None:
        _check_read(repair is not None or (data is None and reads_data(saliency)), ranking, zeros)
    check_rounds(rounds, ranking, budget)
    repairable = saliency is None and ranking == "sensitivity"
    sparsity = (0.5 if limits is None else 0.0) if sparsity is None else sparsity
    saliency = saliency or "l2"
    quantization = quantization or post_training(
        bits, activation_bits, group_size, rounding, ignore, reduce_range,
        activations=activations, calibrated=calibration is not None,
    )  # fmt: skip
    quantization = quantization and _with_names(quantization, part)
    if uniform:
        check_uniform(scope, quantization is not None, zeros)
    alike: Uniform | None = None
    own_class = quantization is not None and asks_for_class(model, keep_class)
    idle = {"prefer_native"} if quantization is not None and not own_class else set()
    notes = list(check_taken(title, ONE_SHOT - idle, given))
    with show_progress(4, progress) as bar:
        bar.step("capturing and coupling")
        once, timed = shared_by(budget), None
        analyzed = partial(analyze, model, example_inputs, example_kwargs, scope=scope, outputs=outputs)
        analysis = once("analysis", analyzed)
        if quantization is not None:
            quantization = replace(quantization, ignore=(*quantization.ignore, *_read_outside(analysis)))
        layer_bits = None if quantization is None else planned_bits(analysis, quantization)
        if quantization is not None:
            sizes = group_sizes(analysis, quantization)
            analysis = replace(analysis, groups=with_group_sizes(analysis.groups, sizes))
        if budget is not None and budget.timed:
            analysis = once("plan", partial(replace, analysis, groups=with_fast_widths(analysis.groups)))
        groups: tuple[ChannelGroup, ...] = ()
        kept: Kept = {}
        shown = calibration
        if calibration is None and data is not None and (repair is not None or ranking == "sensitivity"):
            shown, data = once("batches", partial(first_batches, data, seed))
        rows = once("rows", partial(_calibration, model, analysis, example_inputs, example_kwargs, shown))
        mends = repair is not None and rows is not None and not zeros
        if sparsity or budget is not None or quantization is None:
            prunable = find_prunable(analysis, ignore, keep_inputs, prune)
            if uniform:
                alike = alike_layers(analysis, prunable.groups, round_to)
                analysis, prunable = alike.plan, alike.of(prunable)
            parts_to_cut = parts_of(analysis.model, prunable.groups, sparsity)
            groups = tuple(group for each in parts_to_cut for group in each.groups)
            notes += prunable.notes
            _check_weights(analysis.model, saliency)
            bar.step(f"scoring {sum(group.size for group in groups)} units")
            notes += _unused(None if shown is not None else data, loss, saliency)
            read = data if data is not None or not reads_data(saliency) else as_batches(analysis, rows)
            scored = partial(score, saliency, analysis, groups, data=read, loss=loss, seed=seed)
            scores = {} if zeros or repairable else once("scores", scored)
            notes += notes_of(scores)
            bar.step("choosing")
            already: Kept | None = None
            if ranking == "sensitivity":
                probed = partial(
                    by_sensitivity, analysis, parts_to_cut, None if repairable else scores, _needed(rows),
                    budget=None if budget is not None and budget.timed else budget, bits=layer_bits, rounds=rounds,
                )  # fmt: skip
                scores, already, found_notes = probed() if rounds > 1 else once("sensitivities", probed)
                notes += found_notes
            if zeros:
                kept, found_notes = without_zeros(analysis, groups, round_to)
                notes += found_notes
            elif budget is None:
                kept, found_notes = allocate_parts(
                    parts_to_cut, scores, scope=ranking, round_to=round_to, already=already
                )
                notes += found_notes
            else:
                stored = None
                if budget.bytes is not None and quantization is not None and layer_bits is not None:
                    stored = planned_bytes(analysis, quantization, layer_bits)
                if budget.timed:
                    timed = timed_budget(
                        analysis, groups, budget, once, quantization=quantization, bits=layer_bits, stored=stored,
                        round_to=round_to, step=bar.step,
                    )  # fmt: skip
                    by_class = prefer_native and quantization is None and alike is None
                    hold = partial(held_choice, analysis, groups, scores, ranking, round_to) if by_class else None
                    timed, kept = timed.choose(scores, ranking, hold)
                else:
                    kept = allocate_budget(
                        analysis, groups, scores, budget, scope=ranking, round_to=round_to, already=already,
                        bits=layer_bits, stored=stored,
                    )  # fmt: skip
            kept, rounded = in_multiples(kept, scores, round_to, at_most=budget is not None)
            notes += rounded
            if alike is not None and kept:
                meter = None if timed is None else timed.meter
                tied = alike.choose(equal_counts(analysis, kept, scores, budget, ranking, round_to, meter))
                kept = tied(())
        if repair is not None and rows is None and not zeros and by_factor(kept):
            notes.append("not repaired: no calibration= was given")
        with blaming_inputs(analysis.captured):
            if quantization is None:
                bar.step("cutting and verifying")
                cut, choose = cut_groups(analysis, kept, groups, verify=verify), None
                if prefer_native and kept and not zeros:
                    meter = None if timed is None else timed.meter
                    choose = equal_counts(analysis, kept, scores, budget, ranking, round_to, meter)
                    choose = choose if alike is None else alike.choose(choose)
                swaps = choose is not None and budget is None and alike is None and not isinstance(sparsity, Mapping)
                others = other_units(kept, scores, ranking, round_to) if swaps else None
                cut, held = held_by_class(cut, choose, others, widths=alike is None)
                if mends:
                    cut, held = held_by_class(repaired(cut, rows or [], verify=verify), widths=alike is None)
                if alike is not None:
                    held, said_of_config = with_config(analysis, held)
                    notes += said_of_config
                small = as_model(cut.noted(*notes), held, measure_latency=measure_latency)
            else:
                bar.step("cutting, calibrating, lowering and verifying")
                held = None
                if own_class:
                    meter = None if timed is None else timed.meter
                    choose = (
                        equal_counts(analysis, kept, scores, budget, ranking, round_to, meter)
                        if by_factor(kept)
                        else None
                    )
                    cut, held = held_by_class(
                        cut_groups(analysis, kept, groups, verify=False), choose if prefer_native else None
                    )
                    kept = cut.kept
                before = cut_groups(analysis, kept, groups, verify=verify) if mends and by_factor(kept) else None
                before = before and repaired(before, rows or [], verify=False)
                batches, said = calibrating(analysis.captured, quantization, None if calibration is None else rows)
                plan = analysis if before is None else before.plan
                if limits is not None and bit_budget is not None:
                    bar.step("choosing bits")
                    floats = before or cut_groups(plan, kept, groups, verify=False)
                    quantization, chosen = choose_layer_bits(
                        floats,
                        quantization,
                        limits,
                        bit_budget,
                        batches,
                        activations=activation_bits == "same" and activations == "static",
                    )
                    notes.append(chosen)
                cut, integers = cut_to_integers(
                    plan,
                    kept,
                    groups,
                    quantization,
                    batches,
                    verify=verify,
                    repair=repair is not None and calibration is not None,
                    shown=progress,
                    add_biases=held is None or held.module is None,
                )
                cut = cut if before is None else cut.after(before)
                said = (*said, *integers.notes_since(cut.program))
                if held is not None:
                    held, rounds_off = integers_in_class(cut, held, integers)
                    refuse_graph(keep_class, held)
                    said = (*said, *rounds_off)
                small = as_integers(cut.noted(*notes), integers, said, measure_latency=measure_latency, held=held)
            if timed is not None:
                bar.step("timing the original and the result")
                small.report = timed.measured(small, cut.kept)
    if not scope:
        return small
    example = example_arguments(example_inputs, example_kwargs)
    return into_whole(model, small, analysis.captured, example, cut if quantization is None else None)


def _left_out(
    model: nn.Module,
    analysis: Analysis,
    asked_of_blocks: Split,
    rows: list[list[Any]] | None,
    ignore: Sequence[str],
    *,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    repair: str | None,
    verify: bool,
    measure_latency: bool,
    progress: bool,
) -> tuple[CompressedModel, tuple[Block, ...]]:
    """Return the model without blocks, around a submodule where `analysis` is of one, and the blocks that are gone."""
    role = asked_of_blocks.role
    seen = _needed(rows, f"prune={(role,)!r}")
    with blaming_inputs(analysis.captured), show_progress(2, progress) as bar:
        bar.step("choosing blocks")
        gone, said = chosen_blocks(
            analysis, seen, asked_of_blocks.share, asked_of_blocks.budget, ignore, whole=role == LAYER,
            repair=repair is not None,
        )  # fmt: skip
        bar.step("cutting, repairing and verifying")
        small = without_blocks(
            analysis, gone, seen, notes=said, repair=repair is not None, verify=verify, measure_latency=measure_latency
        )
    whole = into_whole(model, small, analysis.captured, example) if analysis.captured.scope else small
    return whole, gone


def _depth_first(
    options: dict[str, Any],
    method: str | Method | Sequence[str | Method],
    stages: Sequence[Method],
    scope: str,
    ignore: Sequence[str],
    keep_inputs: Sequence[str],
    given: Sequence[str],
) -> CompressedModel:
    """Leave blocks out, and compress what is left: units, bits, training.

    Args:
        options: of `compress`, as they were given.
        method, stages, scope, ignore, keep_inputs: as `compress` reads them.
        given: options that ask for something.
    """
    model, bits, quantization = options["model"], options["bits"], options["quantization"]
    inputs = options["example_inputs"], options["example_kwargs"]
    analysis = analyze(model, *inputs, scope=scope, outputs=options["outputs"])
    quantizes = bits is not None or quantization is not None
    split = split_goal(
        analysis, options["prune"], options["sparsity"], options["budget"],
        bits=quantizes, learned_bits=_is_range(bits) and not stages,
        trains=bool(stages), prunes=any(stage.prunes for stage in stages),
        single=any(stage.prunes and "prune" not in stage.takes(Goal()) for stage in stages),
    )  # fmt: skip
    check_units_asked(split, given)
    calibration, data = options["calibration"], options["data"]
    calibration = None if calibration is None else list(calibration)
    shown = calibration
    if calibration is None and data is not None:
        shown, data = first_batches(data, options["seed"])
    example = example_arguments(*inputs)
    first, gone = _left_out(
        model, analysis, split, _calibration(model, analysis, *inputs, shown), ignore, example=example,
        repair=options["repair"], verify=options["verify"], measure_latency=False, progress=options["progress"],
    )  # fmt: skip
    by_outputs = options["ranking"] == "sensitivity" or (data is None and reads_data(options["saliency"] or "l2"))
    read = options["repair"] is not None or by_outputs  # by what follows the blocks
    part = _submodule(model, scope)
    paths = paths_without(analysis, gone, _submodule(first.module, scope))
    following = {
        **options, **split.rest, "model": first.module, "method": method, "data": data, "scope": scope,
        "calibration": calibration if quantizes or (read and not stages) else None,
        "ignore": renamed(ignore, part, paths), "keep_inputs": renamed(keep_inputs, part, paths),
        "measure_latency": False,
    }  # fmt: skip
    small = joined(first, compress(**following))
    if options["measure_latency"]:
        assert isinstance(small.report, Report)
        small.report = with_latency(small.report, analysis, _submodule(small.module, scope))
    return small


def _read_outside(analysis: Analysis) -> tuple[str, ...]:
    """Return the modules of a scope whose tensors the rest of the model reads, too: they stay float."""
    return tuple({name.rpartition(".")[0]: None for name in analysis.captured.outside.reads if "." in name})


def _needed(rows: list[list[Any]] | None, what: str = 'ranking="sensitivity"') -> list[list[Any]]:
    """Return the batches that groups, or blocks, are probed on.

    Raises:
        PlanError: there is none.
    """
    if rows is None:
        raise PlanError(
            f"{what} needs calibration or data, got neither",
            why="the outputs are compared on batches",
            fix=f"calibration=[batch, …], or without {what}",
        )
    return rows


def _unused(data: Any, loss: Any, saliency: str | Saliency) -> list[str]:
    """Name the data and the loss that one shot was given and has no use for."""
    given = [name for name, value in (("data", data), ("loss", loss)) if value is not None]
    if not given or reads_data(saliency):
        return []
    return [f"{' and '.join(given)} not used: the saliency reads weights alone, and nothing was trained"]


def _check_read(repairs: bool, ranking: Scope, zeros: bool) -> None:
    """Refuse calibration data that nothing would read.

    Raises:
        PlanError: nothing is repaired or probed, and no bits are given.
    """
    if zeros:
        raise PlanError(
            'calibration with saliency="zeros", and no bits are given',
            why="nothing reads the data: units go that are zero already, and no output changes",
            fix="bits=8, or no calibration",
        )
    if not repairs and ranking != "sensitivity":
        raise PlanError(
            "calibration with repair=None, and no bits are given",
            why="nothing reads the data",
            fix='repair="least_squares", bits=8, or no calibration',
        )


def _check_stacked(data: Tensor, example_inputs: Any) -> None:
    """Refuse a tensor that is one batch: its rows would be taken for batches.

    Raises:
        PlanError: the tensor has as many dims as an example input, or fewer.
    """
    example = next(iter(tensor_leaves(example_inputs)), None)
    if example is not None and data.dim() <= example.dim():
        raise wrong("data", "a series of batches", data, "data=[batch, …], such as data=tensor.split(32)")


def _scope(model: nn.Module, scope: str | nn.Module) -> str:
    """Return the path of the submodule that `scope` is.

    Raises:
        InputError: `model` is no module.
        PlanError: `scope` is neither a path nor a module of the model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}", fix="give a torch.nn.Module")
    return scope_name(model, scope)


def _submodule(model: nn.Module, scope: str) -> nn.Module:
    """Return the submodule that is compressed; `model` where there is none of that name, which `capture` says."""
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    return modules.get(scope, model)


def _with_names(quantization: PostTraining, part: nn.Module) -> PostTraining:
    """Return the options with names in place of modules, each of a module of `part`.

    Raises:
        PlanError: an entry is of no module.
    """
    config = quantization.config
    overrides = by_module_name(part, config.overrides, "overrides")
    ignore = module_names(part, quantization.ignore, "ignore")
    return replace(quantization, ignore=ignore, config=replace(config, overrides=overrides))


def _check_length(data: Any, loss: Any, training: Training | None, saliency: str | Saliency | None) -> None:
    """Refuse data and a loss that nothing would use: without a length there is no training.

    Raises:
        PlanError: they are given without a length of training, and without a saliency that may use them.
    """
    if data is not None and loss is not None and training is None and not reads_data(saliency):
        raise PlanError(
            "data and loss are given, and no length of training: nothing would be trained",
            why="the saliency reads neither",
            fix="epochs=10, or steps=1000; or saliency='taylor', which ranks units by the gradients of the loss",
        )


def _calibration(
    model: nn.Module,
    plan: Analysis,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    batches: Iterable[Any] | None,
) -> list[list[Any]] | None:
    """The flat inputs of the captured graph for each batch; a submodule's are those it gets when the model runs."""
    captured = plan.captured
    if batches is None:
        return None
    if not captured.scope:
        return flat_batches(plan, batches)
    found, example = [], example_arguments(example_inputs, example_kwargs)
    check_batches(example, batches)
    for k, batch in enumerate(batches):
        try:
            _, args, kwargs = scoped(model, captured.scope, *arguments_like(model, *example, batch))
        except InputError as error:
            raise CalibrationError(
                f"the model does not run on batch {k} of the calibration data",
                at=error.at,
                why=error.why,
                fix="give batches in the form of the example inputs",
            ) from error
        found.append(captured.inputs.of(args, kwargs).flat())
    return checked_samples(found)


def slice_groups(
    plan: Analysis,
    kept: Mapping[ChannelGroup, Tensor | Sequence[int] | Sequence[bool]],
    *,
    up_for_pruning: Sequence[ChannelGroup] | None = None,
    calibration: Iterable[Any] | None = None,
    verify: bool = True,
    measure_latency: bool = False,
) -> CompressedModel:
    """Cut a model to the units given: the raw cut.

    Args:
        plan: what `analyze` returned.
        kept: group of the plan -> indices of the units that stay, or a mask (size,) of bools; groups left out stay
            whole.
        up_for_pruning: the groups whose units count in the report's sparsity (default: all).
        calibration: batches in the form of the inputs that the plan was made with; layers that read what the cut
            changed are repaired on these, as `repair` does. None: the weights that stay are as they were.
        verify: check that the masked and the sliced model agree on the example inputs.
        measure_latency: time the model before and after.

    Raises:
        PlanError: a group is of another plan, or would lose all units, or an index is none of its units.
        VerificationError: the laws do not hold on the result.
    """
    check_options(plan=plan, verify=verify, measure_latency=measure_latency)
    units = as_kept(plan.groups, kept)
    if up_for_pruning is not None:
        check_groups("up_for_pruning", plan.groups, up_for_pruning)
    with blaming_inputs(plan.captured):
        cut = cut_groups(plan, units, up_for_pruning or plan.groups, verify=verify)
        if calibration is not None:
            cut = repaired(cut, flat_batches(plan, calibration), verify=verify)
        _, held = held_by_class(cut)
        return as_model(cut, held, measure_latency=measure_latency)


def repair(
    small: CompressedModel,
    plan: Analysis,
    batches: Iterable[Any],
    *,
    verify: bool = True,
    measure_latency: bool = False,
) -> CompressedModel:
    """Return a cut model with weights that restore, layer by layer, what the layers gave before the cut.

    Each layer that reads what the cut changed is solved by least squares in closed form, in order of execution, on
    unlabelled data: no training, seconds of CPU. Rows count by how much the model's outputs depend on them, so that
    padding behind a mask leaves no trace. The solution shrinks towards the weights as they were cut, by a ridge that is
    chosen per layer on rows that are held out; a layer with fewer than 32 rows stays as it was cut. The error that the
    report names is one on calibration samples: on new data less is gained, and of few dozen samples perhaps nothing.

    Args:
        small: of a cut of `plan` in floats, its weights as they were cut: `compress(…, repair=None)`, `slice_groups`.
        plan: of the model before the cut, what `analyze` returned.
        batches: in the form of the inputs that the plan was made with; labels may follow. Some hundred samples.
        verify: check that the repaired masked and sliced model agree on the example inputs.
        measure_latency: time the model before and after.

    Returns:
        Another model of the same shapes. `.report.repairs` has each layer's error before and after, and the notes say
        which layers keep their weights, and why.

    Raises:
        PlanError: `small` is no cut of `plan`, or its weights are others: quantized, or trained since.
        CalibrationError: the data do not fit, or are not finite.
        VerificationError: the laws do not hold on the result.

    Source: least squares towards the sliced weights, `graphcomp.pruning.repair`.
    """
    check_options(plan=plan, verify=verify, measure_latency=measure_latency)
    check_instance("small", small, CompressedModel, "slice_groups(plan, kept)")
    with blaming_inputs(plan.captured):
        cut = cut_again(plan, small)
        cut = repaired(cut, flat_batches(plan, batches), verify=verify)
        _, held = held_by_class(cut)
        return as_model(cut, held, measure_latency=measure_latency)


def finetune(
    small: CompressedModel,
    data: Iterable[Any],
    loss: Callable[..., Tensor] | None = None,
    *,
    training: Training,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    verify: bool = True,
    measure_latency: bool = False,
    progress: bool = True,
    seed: int = 0,
) -> CompressedModel:
    """Return a cut model in floats that was trained on: the shapes stay, and with a teacher little is lost.

        training = graphcomp.Training(steps=1000, teacher=model, distill=graphcomp.Distill(temperature=2.0))
        small = graphcomp.finetune(small, batches, training=training)  # without labels; with a loss, both count

    Args:
        small: of `compress`, `repair`, `slice_groups`, in floats. Not modified.
        data: batches to train on, as for `compress`.
        loss: loss(model output, batch) -> scalar; None: what the teacher says alone is learned.
        training: how: the length of the run, the teacher and what is learned of it; see `Training`. With `held_out` the
            loss is measured on these batches before and after: where training has not lowered the loss, the weights
            are those of `small`. The report has both losses.
        example_inputs, example_kwargs: as for `compress`; by default those the model was compressed with.
        verify: check in float64 that the trained graph and the result compute the same.
        measure_latency: time the model before and after.
        progress: show a progress line on the terminal.
        seed: of all that is drawn.

    Returns:
        Another model of the same form. `report` has the costs of the original, as that of `small`, and says what was
        learned.

    Raises:
        PlanError: weights are integers, there are no example inputs, nothing to learn, or the teacher does not fit.
        CaptureError: the model can only be recorded, which cannot be trained.
        TrainingError, CheckpointError, VerificationError: as for `compress`.
    """
    check_options(
        data=data, loss=loss, training=training, example_kwargs=example_kwargs, verify=verify,
        measure_latency=measure_latency, progress=progress, seed=seed,
    )  # fmt: skip
    check_instance("small", small, CompressedModel, "small = graphcomp.compress(model, x, sparsity=0.5)")
    args, kwargs = inputs_of(small, example_inputs, example_kwargs)
    tuned = compress(
        trainable(small), args, kwargs, method=Finetune(), data=data, loss=loss, training=training, verify=verify,
        measure_latency=measure_latency, progress=progress, seed=seed,
    )  # fmt: skip
    return with_values(small, tuned)


def find_blocks(plan: Analysis) -> tuple[Block, ...]:
    """Find the residual blocks of a model: what `drop_blocks` and `compress(…, prune=("block",))` can leave out.

    A block is found in the graph, by no name: a sum h + f(h), with the ops that stand behind the sum and in front of h
    alike (post-norm, ReLU after the sum). `Block.name` is the path of the module that holds the block's parameters.

    Args:
        plan: what `analyze` returned.

    Returns:
        The blocks, in order of execution.

    Raises:
        PlanError: the model could only be recorded.
    """
    check_options(plan=plan)
    return blocks_of(plan)


def drop_blocks(
    plan: Analysis,
    blocks: Sequence[Block],
    *,
    calibration: Iterable[Any] | None = None,
    verify: bool = True,
    measure_latency: bool = False,
) -> CompressedModel:
    """Leave residual blocks out: what read the stream behind a block reads the stream in front.

    With calibration, the last layer in front of blocks gets the weights that best make up for these, in closed form:
    one linear map, folded into the layer (ReplaceMe, Shopkhoev et al., 2025). The report names the layers, and the
    blocks for which there is none.

    Args:
        plan: what `analyze` returned.
        blocks: some of `find_blocks(plan)`.
        calibration: batches in the form of the inputs that the plan was made with; labels may follow.
        verify: compare the graph without the blocks with one in which they add nothing, before the repair.
        measure_latency: time the model before and after.

    Returns:
        A model of the user's own class, where the blocks make up whole children of a list of modules; else a graph.

    Raises:
        PlanError: a block is of another plan.
        CalibrationError: the data do not fit, or are not finite.
        VerificationError: the law does not hold on the result.
    """
    check_options(plan=plan, verify=verify, measure_latency=measure_latency)
    chosen = checked_blocks(blocks_of(plan), blocks)
    with blaming_inputs(plan.captured):
        rows = [] if calibration is None else flat_batches(plan, calibration)
        return without_blocks(plan, chosen, rows, verify=verify, measure_latency=measure_latency)


def trim_vocabulary(
    model: nn.Module,
    token_ids: Any,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    embedding: Modules = (),
    heads: Modules | None = None,
    logits: Logits = "wide",
    unknown: int | None = None,
    outputs: str | Sequence[str] | None = None,
    verify: bool = True,
    measure_latency: bool = False,
) -> CompressedModel:
    """Return a copy of `model` without the embedding rows that no text of a task uses; outputs stay as they were.

    An id map (one integer per id) stands in front of the embedding: the copy takes the ids of the old tokenizer. The
    outputs are bit-equal on all texts of the kept ids; logits of a head that is cut, a product of another shape, are
    equal up to rounding, and -inf for ids that are gone. A loss or a perplexity of these logits is one over the kept
    ids alone, and so lower; it is inf for a label that is gone.

        ids = [tokenizer(text)["input_ids"] for text in texts]
        small = graphcomp.trim_vocabulary(model, ids, example_inputs)

    Args:
        model: any model that looks rows up by integer ids of an input; or a CompressedModel in floats. Not modified.
        token_ids: ids that texts of the task hold: a tensor or an array of ids, or an iterable of ids or of such. Ids
            for padding, special ids that a transformers config names, and ids that the model puts in itself, are kept
            besides.
        example_inputs, example_kwargs: as for `compress`; ids of `token_ids` alone.
        embedding: the module, or the modules, that hold the table. Default: the one table that ids of the inputs read
            and that has a row for each of `token_ids`; of several, that of `get_input_embeddings` of transformers.
        heads: modules of untied heads, with one row per id, that are cut, too. A head that multiplies with the table
            itself is always cut. None: that of `get_output_embeddings` of transformers, so that `generate` chooses
            among the ids that are kept; of other models none.
        logits: of a head that is cut: "wide": in the old columns, those of ids that are gone -inf, as `generate` and
            losses on old ids need; "narrow": one column per kept id, in the order of `kept[weight][0]`.
        unknown: the id that stands for any id without a row. None: such ids are refused when the result is called, by
            an index error.
        outputs: names of the outputs that matter.
        verify: compare with the model, on the example inputs and on other kept ids.
        measure_latency: time the model before and after (one thread, milliseconds).

    Returns:
        A CompressedModel whose `.kept` has the kept ids for each tensor that lost rows. It can be compressed further:
        `compress(small.module, example_inputs)`.

    Raises:
        CaptureError, InputError: the model cannot be captured, or does not run on the inputs.
        PlanError: no such table, several and none named, one that other ops read; ids that are not whole, negative or
            beyond the table; no ids; example inputs of other ids; an output that is computed of the logits of all ids
            together, such as a loss or probabilities; a model that is quantized already, or could only be recorded.
        VerificationError: the result does not compute what the model does.
    """
    check_options(
        example_kwargs=example_kwargs, logits=logits, unknown=unknown, outputs=outputs, verify=verify,
        measure_latency=measure_latency,
    )  # fmt: skip
    model = model.module if isinstance(model, CompressedModel) else model
    analysis = analyze(model, example_inputs, example_kwargs, outputs=outputs)
    with blaming_inputs(analysis.captured):
        return trimmed(
            analysis,
            token_ids,
            embedding=module_names(model, embedding, "embedding"),
            heads=None if heads is None else module_names(model, heads, "heads"),
            logits=logits,
            unknown=unknown,
            verify=verify,
            measure_latency=measure_latency,
        )


def time_layers(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    table: LatencyTable | None = None,
    bits: int | None = None,
    activation_bits: int | Literal["same"] | None = "same",
    activations: Activations = "static",
    quantization: PostTraining | None = None,
    ignore: Modules = (),
    keep_inputs: Modules = (),
    prune: Sequence[str] | None = None,
    round_to: int = 1,
    scope: str | nn.Module = "",
    outputs: str | Sequence[str] | None = None,
    progress: bool = True,
) -> LatencyTable:
    """Return a table of the times of each layer at ten widths, on this machine, for budgets on latency.

    Layers that are equal are timed once, each with what a runtime fuses behind it, and a few narrower networks as a
    whole. Files are written for onnxruntime, which takes most of the time: a minute or more.

    Args:
        model: not modified.
        example_inputs, example_kwargs: as for `compress`; times are of this batch.
        table: how to measure, and what is known already. Default: `LatencyTable()`, onnxruntime with one thread.
        bits, activation_bits, activations, quantization, ignore, keep_inputs, prune, round_to, scope, outputs: as for
            `compress`: the options that the table will be used with. Only widths that may be cut are varied.
        progress: show a progress line on the terminal (silent elsewhere).

    Returns:
        Another table, with all that `table` holds.

    Raises:
        PlanError: no graph of the model runs; the table is of another machine and lacks layers.
        NothingToPrune: every axis is frozen.
        ExportError: the `onnx` extra is not installed; an op has no ONNX form.
    """
    check_options(
        example_kwargs=example_kwargs, activation_bits=activation_bits, activations=activations,
        quantization=quantization, prune=prune, round_to=round_to, outputs=outputs, progress=progress, table=table,
    )  # fmt: skip
    scope = _scope(model, scope)
    part = _submodule(model, scope)
    ignore = module_names(part, ignore, "ignore")
    if isinstance(bits, (tuple, list)):
        raise PlanError(
            f"bits={bits!r}: layers are timed with one number of bits", fix=f"bits={bits[-1] if bits else 8}"
        )
    if quantization is not None:
        _check_alone(bits, activation_bits, 0, "nearest", False, activations)
    quantization = quantization or post_training(bits, activation_bits, 0, "nearest", ignore, activations=activations)
    quantization = quantization and _with_names(quantization, part)
    with show_progress(DESIGNS + 3, progress) as bar:
        bar.step("capturing and coupling")
        analysis = analyze(model, example_inputs, example_kwargs, scope=scope, outputs=outputs)
        if quantization is not None:
            quantization = replace(quantization, ignore=(*quantization.ignore, *_read_outside(analysis)))
            planned_bits(analysis, quantization)
            sizes = group_sizes(analysis, quantization)
            analysis = replace(analysis, groups=with_group_sizes(analysis.groups, sizes))
        analysis = replace(analysis, groups=with_fast_widths(analysis.groups))
        groups = find_prunable(analysis, ignore, keep_inputs, prune).groups
        with blaming_inputs(analysis.captured):
            found, _ = time_plan(
                analysis, groups, table or LatencyTable(), quantization=quantization, round_to=round_to, step=bar.step
            )
    return found


def family(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    speedups: Sequence[float],
    table: LatencyTable | None = None,
    baseline: Baseline = "original",
    **options: Any,
) -> list[CompressedModel]:
    """Return one smaller model for each speedup, each as `compress(…, budget=Budget(speedup=…))` returns it.

    The model is captured, scored, probed and timed once, and each cut is repaired on the same calibration data.

    Args:
        model: not modified.
        example_inputs, example_kwargs: as for `compress`.
        speedups: how many times as fast as the baseline, at least; one or more, each above 0.
        table, baseline: measured times of the layers, and what the speedups count from; see `Budget`.
        options: of `compress` in one shot: calibration, bits, saliency, ranking, repair, … `sparsity` and `budget` are
            none.

    Returns:
        In the order of `speedups`. Each stands alone: no two share tensors.

    Raises:
        PlanError: no speedup, options that are none of a family, or see `compress`.
        BudgetError: a speedup that no choice of units has: the largest is made first.
        TypeError: an option that `compress` does not have.
    """
    check_options(table=table, speedups=speedups)
    for name in ("sparsity", "budget", "method", "training", "epochs", "steps", "lr", "folder"):
        if options.get(name) is not None:
            raise PlanError(
                f"{name} beside speedups", why="a family is cut in one shot, by its speedups", fix="compress"
            )
    shared = Once()
    made: dict[float, list[CompressedModel]] = {}
    for speedup in sorted(speedups, reverse=True):  # one out of reach is refused before the others are made
        budget = MemberBudget(speedup=speedup, table=table, baseline=baseline, shared=shared)
        small = compress(model, example_inputs, example_kwargs, budget=budget, **options)
        made.setdefault(speedup, []).append(small)
    return [made[speedup].pop() for speedup in speedups]


def prunable_groups(
    analysis: Analysis, *, ignore: Modules = (), keep_inputs: Modules = (), prune: Sequence[str] | None = None
) -> tuple[ChannelGroup, ...]:
    """The groups that a method may cut.

    Args:
        analysis: what `analyze` returned.
        ignore, keep_inputs, prune: as for `compress`.

    Raises:
        PlanError: an entry of `ignore` or `keep_inputs` is of no module, or `prune` holds no role.
        NothingToPrune: none is left.
    """
    check_options(analysis=analysis)
    return find_prunable(analysis, ignore, keep_inputs, prune).groups


# ------------------------------------------------------------------------------------------------ by training
def _trained(
    model: nn.Module,
    stages: Sequence[tuple[Method, Goal, Training]],
    source: Callable[..., Prepared],
    trained: Callable[..., None] | None,
    measured: Sequence[Sequence[Any]],
    search: Search,
    *,
    example: tuple[tuple[Any, ...], dict[str, Any]],
    scope: str,
    progress: bool,
) -> Prepared:
    """The stages of a method one after the other, which train `model` itself; what one removes stays out in the next.

    With a scope, the prepared submodule stands in the model while it is trained.

    Args:
        trained: trains a stage; None: the search alone is asked for.
        measured: batches that each stage is compared on with what it began with; none: it is not compared.
        search: of the methods that search.
    """
    following = Following(source)
    remarks: dict[str, None] = {}
    for (method, goal, training), batches in zip(stages, measured, strict=True):
        with show_progress(1, progress) as bar:
            bar.step("capturing, coupling and calibrating")
            ready = following.prepare(method, goal)
        _check_called(ready.session.plan.captured)
        remarks |= dict.fromkeys(ready.remarks)
        title = f"{method.name}: " * (len(stages) > 1)
        rows = search.rows(ready.session.plan) if method.searches else []
        with standing_in(model, ready, *example) as whole:
            if method.searches:
                with show_progress(1, progress) as bar:
                    search(method, ready, goal, whole, rows, training.folder, bar.step)
            begin = partial(method.begin, ready, goal)
            remarks |= dict.fromkeys(ready.remarks)
            if trained is None:
                continue
            trained(ready, training=training, begin=begin, whole=whole, measured=batches, title=title)
        remarks |= dict.fromkeys(ready.remarks)
    ready.remarks = tuple(remarks)
    return ready


def _check_called(captured: Captured) -> None:
    """Raise PlanError where the rest of the model calls parts of the submodule that becomes a graph while it trains."""
    if captured.outside.called:
        path = captured.outside.called[0]
        raise PlanError(
            f"'{captured.scope}' cannot be trained alone",
            at=captured.outside.reads.get(f"{path}.weight", ""),
            why=f"the rest of the model calls '{captured.scope}.{path}' itself",
            fix="train the whole model, without scope=, or a submodule of which the rest calls no part",
        )


def _training(training: Training | None, **short: Any) -> Training | None:
    """What is asked of the training, given at once or one by one; None where nothing is.

    Raises:
        PlanError: both, something else, or numbers out of range.
    """
    if training is not None and not isinstance(training, Training):
        raise PlanError(f"training is a {type(training).__name__}", fix="training=graphcomp.Training(steps=1000, …)")
    given = {name: value for name, value in short.items() if value is not None}
    if training is None:
        return Training(**given) if given else None
    if given:
        raise PlanError(
            f"{', '.join(given)} beside training=",
            fix=f"training=Training({', '.join(f'{name}={value!r}' for name, value in given.items())}, …)",
        )
    return training


# ------------------------------------------------------------------------------------------------ checks of arguments
def _check_one_shot(activation_bits: Any, training: Training | None) -> None:
    if isinstance(activation_bits, (tuple, list)):
        raise PlanError(
            f"activation_bits={activation_bits!r}: bits between two bounds are learned in training",
            why='in one shot, with bits=(4, 8), activations have the bits of the layer ("same"), or one number of bits',
            fix=f"activation_bits={activation_bits[-1] if activation_bits else 8}, or data=loader, "
            "loss=lambda output, batch: …, epochs=10",
        )
    if training is not None:
        raise PlanError(
            'method="oneshot" does not train, and a training is asked for',
            why="without a method, it takes data, a loss and a length (epochs or steps) to train",
            fix="data=loader, loss=lambda output, batch: …, epochs=10",
        )


def _check_alone(
    bits: Any,
    activation_bits: Any,
    group_size: int,
    rounding: Rounding,
    reduce_range: bool,
    activations: str = "static",
) -> None:
    """Raise PlanError where an option of quantization is given beside `quantization`."""
    others = _quantizing(None, group_size, rounding, reduce_range) | {"activations": activations != "static"}
    one_by_one = {"bits": bits is not None, "activation_bits": activation_bits != "same", **others}
    if given := [name for name, value in one_by_one.items() if value]:
        raise PlanError(
            f"{', '.join(given)} beside quantization=",
            why="it holds all options of quantization",
            fix="quantization=PostTraining(QuantConfig(…)), or the others alone",
        )


def _quantizing(quantization: Any, group_size: int, rounding: Rounding, reduce_range: bool) -> dict[str, bool]:
    """Return which options of quantization are given, but for those of bits."""
    return {
        "quantization": quantization is not None, "group_size": bool(group_size), "rounding": rounding != "nearest",
        "reduce_range": reduce_range,
    }  # fmt: skip


def _is_range(bits: Any) -> bool:
    """Return whether `bits` is a range of more than one number of bits."""
    return isinstance(bits, (tuple, list)) and len(set(bits)) > 1


def _start(
    bits: Any,
    activation_bits: Any,
    group_size: int,
    rounding: Rounding,
    reduce_range: bool,
    quantization: PostTraining | None,
) -> PostTraining | None:
    """Return the post-training quantization that LSQ starts from; None where no bits are given.

    Ranges have the least squared error: at few bits the largest value is a poor end of a range.

    Raises:
        PlanError: options that do not go together, or bits out of range.
    """
    if quantization is not None:
        _check_alone(bits, activation_bits, group_size, rounding, reduce_range)
        if quantization.config.dynamic:
            raise PlanError(
                "activations with ranges at run time cannot be trained",
                why="LSQ learns the ranges of activations",
                fix='QuantConfig(activations=QuantSpec(8, symmetric=False)), or method="oneshot"',
            )
        return quantization
    one = [own[0] if isinstance(own, (tuple, list)) and own else own for own in (bits, activation_bits)]
    return post_training(one[0], one[1], group_size, rounding, (), reduce_range, observer="mse")


def _held_out(batches: Iterable[Any]) -> list[Any]:
    """Return the batches that the loss is measured on.

    Raises:
        PlanError: there is none.
    """
    if not (found := list(batches)):
        raise PlanError("Training(held_out=…) holds no batches", fix="held_out=[batch, …], or None")
    return found


def _check_held_out(compares: bool, training: Training | None) -> None:
    """Raise PlanError where held-out data are given that nothing is measured on."""
    if not compares and training is not None and training.held_out is not None:
        raise PlanError(
            "Training(held_out=…) of a method other than LSQ and of finetune",
            why="the loss is measured before and after training where what training begins with is a result already",
            fix='method="qat" with bits=4, graphcomp.finetune(small, …), or no held_out',
        )


def _check_gradients(method: str) -> None:
    if torch.is_inference_mode_enabled():
        raise PlanError(
            f"method={method!r} in torch.inference_mode()",
            why="tensors that are made in it have no gradients",
            fix="call graphcomp.compress outside of it",
        )


def _check_weights(model: nn.Module, saliency: str | Saliency | None) -> None:
    """Weights that no score can be taken of: not there, or not numbers."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta and saliency != "random":
            raise PlanError(
                "the model is on the meta device: it has no weights to score",
                at=f"parameter '{name}'",
                fix="use graphcomp.analyze and graphcomp.slice_groups, or saliency='random'",
            )
        if parameter.is_floating_point() and not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            raise PlanError(
                f"parameter '{name}' holds {count} values that are NaN or infinite",
                fix="load a sound checkpoint",
            )


# ------------------------------------------------------------------------------------------------ later parts
def load(
    folder: str | Path,
    *,
    model_factory: Callable[[], nn.Module] | None = None,
    trust: str | Iterable[str] = (),
) -> CompressedModel:
    """Rebuild what `CompressedModel.save` wrote, without the original weights. No code of the folder is run.

    Args:
        folder: the checkpoint folder.
        model_factory: returns the original architecture (any weights), for native models whose class and constructor
            arguments could not be recorded.
        trust: packages whose classes, and namespaces whose ops, the folder may name, besides those of torch,
            torchvision, transformers, timm, and modules that are imported already.

    Raises:
        CheckpointError: not a checkpoint, damaged, written by a newer graphcomp, a class that cannot be built, or a
            module or an op that the folder may not name.
    """
    from graphcomp.checkpoint.folder import load as load_folder

    check_options(path=folder, model_factory=model_factory, trust=trust)
    return load_folder(folder, model_factory=model_factory, trust=trust)


def prepare(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    bits: int | tuple[int, int] | None = (4, 8),
    activation_bits: int | tuple[int, int] | Literal["same"] | None = "same",
    layer_bits: Mapping[Any, Any] | None = None,
    quantizer: Literal["geta", "lsq"] | None = None,
    group_size: int = 0,
    quantization: PostTraining | None = None,
    learn_exponent: bool = False,
    calibration: Iterable[Any] | None = None,
    ignore: Modules = (),
    keep_inputs: Modules = (),
    prune: Sequence[str] | None = None,
    scope: str | nn.Module = "",
    outputs: str | Sequence[str] | None = None,
    recompute: bool = False,
) -> Prepared:
    """A copy of `model` to train in your own loop, with fake-quant and mask nodes in place.

    It is called like the model, its parameters have the model's names, and it can be copied, saved by `state_dict`,
    compiled and wrapped. `graphcomp.QASSO` trains it, `graphcomp.finalize` makes the small model of it.

    Args:
        model: not modified.
        example_inputs, example_kwargs: as for `compress`.
        bits: the range of bits that each layer's weight and activations end in; an int: exactly these; None: nothing
            is quantized.
        activation_bits: those of activations, where they differ from `bits`: a range, or an int; None: weights only,
            activations stay float.
        layer_bits: module name or "re:" pattern -> a range for the layer's weight and for what the layer reads, (4, 8),
            or one each, ((4, 4), (8, 8)); the last that matches counts, before `bits` and `activation_bits`. Where
            layers that read one value are given different ranges, the highest counts, and the report says so. An int:
            exactly these bits.
        quantizer: "geta": a learned step and range for each tensor, and with a range of bits, learned bits. "lsq": LSQ
            for weights (a learned step for each output channel) and LSQ+ for activations (a learned step and zero
            point), at fixed bits, 8 at least in the first and the last layer, from what post-training quantization
            gives; any optimizer trains it, and `QASSO` prunes it too. Default: "lsq" with group_size or quantization,
            else "geta".
        group_size: so many input indices of a weight share a step; 0: one step per output channel.
        quantization: all options of the post-training quantization that LSQ starts from, in place of bits,
            activation_bits and group_size.
        learn_exponent: let the levels of weights be unevenly spaced, x^t, with t learned. The integers stay integers.
        calibration: batches, in the form of the example inputs, that the first ranges of activations are read off;
            without it, the example inputs.
        ignore, keep_inputs, prune: as for `compress`.
        scope: prepare one submodule, which is what is returned: put it in its place in your model to train it there.
        outputs: names of the outputs that matter.
        recompute: compute quantized weights and activations again in the backward pass instead of keeping them for it:
            about as much memory as the float model takes, for a little more time.

    Raises:
        CaptureError, InputError: the model cannot be captured, or only be recorded, which cannot be trained.
        PlanError: bits outside 2 to 16, a name that matches no module.
        CalibrationError: calibration data that do not fit, or are not finite.
    """
    check_options(
        example_kwargs=example_kwargs, activation_bits=activation_bits, layer_bits=layer_bits, quantizer=quantizer,
        group_size=group_size, quantization=quantization, learn_exponent=learn_exponent, prune=prune,
        outputs=outputs, recompute=recompute,
    )  # fmt: skip
    scope = _scope(model, scope)
    part = _submodule(model, scope)
    layer_bits = by_module_name(part, {} if layer_bits is None else layer_bits, "layer_bits")
    if layer_bits and bits is None and quantization is None:
        raise PlanError("layer_bits needs bits, got bits=None", fix="bits=(4, 8); ignore= leaves single layers float")
    start = _lsq(quantizer, bits, activation_bits, layer_bits, group_size, quantization, learn_exponent)
    ready = _prepared(
        _own(model),
        example_inputs,
        example_kwargs,
        bits=bits if start is None else None,
        activation_bits=activation_bits if start is None else None,
        layer_bits=layer_bits if start is None else None,
        start=start and _with_names(start, part),
        learn_exponent=learn_exponent,
        calibration=calibration,
        ignore=module_names(part, ignore, "ignore"),
        keep_inputs=module_names(part, keep_inputs, "keep_inputs"),
        prune=prune,
        scope=scope,
        outputs=outputs,
    )
    ready.recompute = recompute
    return ready


def _own(model: nn.Module) -> nn.Module:
    """A copy to train.

    Raises:
        InputError: something in it cannot be copied.
    """
    try:
        return copied(model)
    except Exception as error:  # of whatever the model holds
        raise InputError(
            f"{type(model).__name__} cannot be copied, to train the copy",
            why=str(error).partition("\n")[0][:300],
            fix="copy.deepcopy(model) has to work: tensors that were computed, locks and files are in its way",
        ) from error


def _prepared(
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None,
    *,
    bits: int | tuple[int, int] | None = None,
    activation_bits: int | tuple[int, int] | Literal["same"] | None = "same",
    layer_bits: Mapping[str, Any] | None = None,
    start: PostTraining | None = None,
    repair: bool = False,
    config: QuantConfig | None = None,
    learn_exponent: bool = False,
    calibration: Iterable[Any] | None = None,
    ignore: Sequence[str],
    keep_inputs: Sequence[str],
    prune: Sequence[str] | None,
    scope: str,
    outputs: str | Sequence[str] | None,
) -> Prepared:
    """As `prepare`, but the tensors are those of `model`, which is trained then.

    Args:
        start: what LSQ begins with.
        repair: move weights towards the float output of their layers before they are rounded at the start.
        config: quantizers at fixed bits on the weights as they are.
    """
    limits, of_activations = _limits(bits), _activation_limits(bits, activation_bits)
    captured = capture(model, example_inputs, example_kwargs, scope=scope, outputs=outputs, training=True)
    if captured.producer == "record":
        raise CaptureError(
            f"{type(model).__name__} cannot be trained: it could only be recorded",
            why=f"torch.export refused: {captured.reason}",
            fix='scope="path.to.submodule" prepares a part that can be exported',
        )
    check_second_call(captured)
    quantized = limits is not None or start is not None or config is not None
    if quantized:
        check_floats(captured)
    other = settle_gradients(captured, quantized=quantized)
    plan = analyze_captured(captured)
    groups: tuple[ChannelGroup, ...] = ()
    notes: tuple[str, ...] = ()
    no_groups = ""
    try:
        prunable = find_prunable(plan, ignore, keep_inputs, prune)
        groups, notes = prunable.groups, prunable.notes
    except NothingToPrune as error:
        no_groups = error.why  # it can still be quantized; QASSO says it where units are to go
    batches = _calibration(model, plan, example_inputs, example_kwargs, calibration if quantized else None)
    if batches is None:
        batches = [captured.inputs.flat()]
    quantizing: Quantizing | None = None
    if start is not None:
        quantizing = FromPostTraining(start, repair)
    elif limits is not None:
        config = training_config(limits[1], of_activations and of_activations[1], learn_exponent)
        own_bits = {name: _layer_bits(own) for name, own in (layer_bits or {}).items()}
        quantizing = AsTheyAre(config, limits, of_activations, own_bits)
    elif config is not None:
        quantizing = AsTheyAre(config)
    with blaming_inputs(captured):
        return prepare_graph(
            plan,
            groups,
            quantizing,
            ignore=(*ignore, *_read_outside(plan)),
            batches=batches,
            no_groups=no_groups,
            notes=(*notes, other) if other else notes,
        )


def _lsq(
    quantizer: str | None,
    bits: Any,
    activation_bits: Any,
    layer_bits: Mapping[str, Any] | None,
    group_size: int,
    quantization: PostTraining | None,
    learn_exponent: bool,
) -> PostTraining | None:
    """Return what LSQ starts from, by the arguments of `prepare`; None where GETA's quantizers are asked for.

    Raises:
        PlanError: arguments that do not go together.
    """
    if quantizer not in (None, "geta", "lsq"):
        raise PlanError(f"quantizer={quantizer!r} is not known", fix='quantizer="lsq" or quantizer="geta"')
    asks = quantization is not None or bool(group_size)
    if quantizer == "geta" and asks:
        raise PlanError(
            "group_size and quantization are not for GETA's quantizer",
            why="GETA's quantizer has one step per tensor",
            fix='quantizer="lsq"',
        )
    if quantizer != "lsq" and not asks:
        return None
    if learn_exponent:
        raise PlanError("LSQ learns no exponent, got learn_exponent=True", fix='quantizer="geta"')
    given: tuple[Any, Any] = (None if quantization is not None and bits == (4, 8) else bits, activation_bits)
    for name, own in zip(("bits", "activation_bits"), given, strict=True):
        if _is_range(own):
            raise PlanError(f"{name} of LSQ must be one number of bits, got {own!r}", fix=f"{name}={own[0]}")
    start = _start(*given, group_size, "nearest", False, quantization)
    if start is None:
        raise PlanError("LSQ needs bits, got bits=None", fix="bits=4")
    return _with_layer_bits(start, layer_bits or {})


def _with_layer_bits(start: PostTraining, layer_bits: Mapping[str, Any]) -> PostTraining:
    """Return the options with other bits for the layers that are named."""
    config, overrides = start.config, dict(start.config.overrides)
    for name, own in layer_bits.items():
        asked = _layer_bits(own)
        for low, high in (asked.weights, asked.activations):
            if low != high:
                raise PlanError(
                    f"layer_bits of LSQ must be one number of bits for each tensor, got {name!r}: {own!r}",
                    fix=f"layer_bits={{{name!r}: (({low}, {low}), ({high}, {high}))}} for the weight and the input",
                )
        overrides[name] = (
            with_bits(config.weights, asked.weights[0]), with_bits(config.activations, asked.activations[0])
        )  # fmt: skip
    return replace(start, config=replace(config, overrides=overrides))


def _limits(bits: int | tuple[int, int] | None, name: str = "bits") -> tuple[int, int] | None:
    if bits is None or isinstance(bits, (tuple, list)):
        return None if bits is None else _range(bits, name)
    check_bits(bits, name)
    return bits, bits


def _activation_limits(
    bits: int | tuple[int, int] | None, activation_bits: int | tuple[int, int] | Literal["same"] | None
) -> tuple[int, int] | None:
    """Return the fewest and the most bits of activations; None where activations stay float.

    Raises:
        PlanError: `activation_bits` is no number of bits, or given where nothing is quantized.
    """
    if isinstance(activation_bits, str) and activation_bits != "same":
        raise PlanError(
            f"activation_bits={activation_bits!r} is not known",
            why='activation_bits must be a number of bits, a range, "same" or None',
            fix="activation_bits=8",
        )
    if activation_bits is None or activation_bits == "same":
        return None if activation_bits is None else _limits(bits)
    if bits is None:
        raise PlanError("activation_bits needs bits, got bits=None", fix="bits=8")
    return _limits(activation_bits, "activation_bits")


def _layer_bits(own: Any) -> LayerBits:
    """Return the ranges of one entry of `layer_bits`.

    Raises:
        PlanError: the entry is neither a range nor a pair of ranges.
    """
    if isinstance(own, (tuple, list)) and len(own) == 2 and all(isinstance(part, (tuple, list)) for part in own):
        return LayerBits(_range(own[0]), _range(own[1]))
    both = (check_bits(own), own) if isinstance(own, int) else _range(own)
    return LayerBits(both, both)


def _range(bits: Sequence[int], name: str = "bits") -> tuple[int, int]:
    """`bits` as two whole numbers in order.

    Raises:
        PlanError: they are not.
    """
    if not isinstance(bits, (tuple, list)) or len(bits) != 2:
        raise PlanError(f"{name}={bits!r} is no pair of bounds", fix=f"{name}=(4, 8)")
    low, high = bits
    check_bits(low, name)
    check_bits(high, name)
    if low > high:
        raise PlanError(f"{name}={bits!r}: the fewest come first", fix=f"{name}={(high, low)}")
    return low, high


def shrink(ready: nn.Module) -> Prepared:
    """A copy of a prepared module without the units that are gone, to train on with: what is left to compute takes less
    time and memory than masks do.

    The quantizers come along as they are. It can be shrunk again, and `finalize` makes the small model of it, with what
    the whole model costs in the report. An optimizer is of the parameters it was made for, so make a new one:

        small = graphcomp.shrink(ready)  # when the joint stage is over
        cooldown = graphcomp.Schedule(steps, warmup=0, projection=0, joint=0)
        optimizer = graphcomp.QASSO(small, torch.optim.SGD, lr=0.05, sparsity=0.0, schedule=cooldown)

    Args:
        ready: what `prepare` returned, after the joint stage or with units masked by `ready.keep`; also inside
            wrappers. Not modified.

    Raises:
        PlanError: it was not prepared, or a schedule was begun and not followed to its cool-down.
        VerificationError: weights of units that are gone are there, as in an average (EMA) begun too early.
    """
    return shrunk(unwrapped(ready))


def finalize(ready: nn.Module, *, verify: bool = True, measure_latency: bool = False) -> CompressedModel:
    """The small model that training made of a prepared one: removed units are sliced out, batch norms folded, weights
    stored as the integers they were trained to be. Embedding tables, trained in floats, get 8 bits per row.

    An average of the weights (EMA, SWA) is finalized as the module itself, `finalize(ema.module)`, where it was begun
    in the cool-down; masks are 0 or 1 and bits are whole in it then.

        optimizer.step()
        if optimizer.settled:
            ema = ema or torch.optim.swa_utils.AveragedModel(ready, multi_avg_fn=get_ema_multi_avg_fn(0.999))
            ema.update_parameters(ready)

    One that was begun before holds other bits and something of the units that are gone. What is left of these, by
    then a tenth of the largest weight at most, counts as zero, as the masks say; all else is refused.

    Args:
        ready: what `prepare` returned, after training; also inside wrappers. Not modified.
        verify: check in float64 that trained, sliced and folded model compute the same, and Law 3.
        measure_latency: time the model before and after.

    Raises:
        PlanError: it was not prepared, a schedule was begun and not followed to its cool-down, or it is an average
            that was begun before.
        TrainingError: a parameter or buffer is NaN or infinite.
        VerificationError: the small model does not compute what the trained one does. Nothing is returned then.
    """
    check_options(verify=verify, measure_latency=measure_latency)
    return as_trained(unwrapped(ready), verify=verify, measure_latency=measure_latency)
