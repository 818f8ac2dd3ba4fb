"""What a training method is: which views stand on which weights, and what happens around each step of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from graphcomp.cost.conventions import Convention
from graphcomp.errors import PlanError
from graphcomp.methods.takes import ACTIVATIONS, START
from graphcomp.pruning.allocation import Budget
from graphcomp.pruning.saliency import Saliency
from graphcomp.quantization.ptq import PostTraining
from graphcomp.quantization.spec import QuantConfig
from graphcomp.training.options import Training
from graphcomp.training.prepared import Prepared
from graphcomp.training.run import Run


@dataclass(frozen=True)
class Goal:
    """What is asked of a method.

    Attributes:
        sparsity: fraction to remove, or fractions by module; None: what the method has by default.
        budget: limits on the costs of the result.
        bits: the range of bits of weights; None: nothing is quantized, or `start` says how.
        activation_bits: bits of activations, a number or a range; "same" as `bits`; None: activations stay float.
        start: post-training quantization that training starts from; None where bits are learned.
        saliency: how units are ranked; None: as the method has it.
        round_to: the lengths of the dims of each group are multiples of it.
        prune: roles of groups whose units may go; None: the default.
        ignore: modules that keep their width and stay float.
    """

    sparsity: float | Mapping[str, float] | None = None
    budget: Budget | None = None
    bits: tuple[int, int] | None = None
    activation_bits: Any = "same"
    start: PostTraining | None = None
    saliency: str | Saliency | None = None
    round_to: int = 1
    prune: Sequence[str] | None = None
    ignore: tuple[str, ...] = ()

    @property
    def quantizes(self) -> bool:
        """Whether bits are asked for."""
        return self.bits is not None or self.start is not None


def of_activations(goal: Goal) -> Collection[str]:
    """Return the options of activations that a method takes that quantizes activations where the goal asks for that."""
    return ACTIVATIONS if goal.activation_bits is not None else ()


class Source(Protocol):
    """A captured model, of which a method chooses the views that stand on its weights.

    In a list of methods, the model as the methods before have left it.
    """

    def __call__(
        self,
        *,
        bits: tuple[int, int] | None = None,
        activation_bits: Any = "same",
        start: PostTraining | None = None,
        config: QuantConfig | None = None,
    ) -> Prepared:
        """Return the module to train; without arguments in floats, or with the quantizers of the methods before.

        Args:
            bits, activation_bits: of GETA's quantizers, which learn their bits within a range.
            start: LSQ's quantizers, which start from post-training quantization.
            config: quantizers on the weights as they are, calibrated, at the bits of the configuration.
        """


@dataclass(frozen=True, eq=False)
class Shown:
    """What a method that searches may look at before the module is trained.

    Attributes:
        rows: flat inputs of the module's graph.
        score: () -> how good the module is now, in eval mode, on batches that are not among `rows` where there are
            enough; higher is better.
        repair: whether the layers behind units that go are to be repaired in closed form.
        folder: where the method keeps what the method has found; None: nothing is written.
        about: what tells this search from another one: name -> text.
        seed: of everything that is drawn.
        said: takes a text on how far the search is.
    """

    rows: Sequence[Sequence[Any]]
    score: Callable[[], float]
    repair: bool = True
    folder: Path | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    said: Callable[[str], None] = lambda text: None


class Method(ABC):
    """A way to train a model smaller: plain training at fixed bits, of which a method overrides what it does otherwise.

    Attributes:
        name: in messages, and in the folder of a run.
        prunes: whether units or weights go.
        quantizes: whether weights are quantized.
        calibrated: whether training starts from post-training quantization, with all its options, at fixed bits.
        compares: whether the result is what training started from where the loss has not fallen; without a start from
            post-training quantization, on held-out data alone.
        searches: whether the method looks for what goes on data, before training (`search`); such a method needs no
            training.
        convention: of storage, which a budget on bytes counts the codes of weights by (`report.sizes`); None: a budget
            counts all bytes of the result.
    """

    name: ClassVar[str]
    prunes: bool = False
    quantizes: bool = False
    calibrated: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    searches: ClassVar[bool] = False
    convention: Convention | None = None

    def check(self, goal: Goal) -> None:  # noqa: B027 (most methods have nothing to refuse)
        """Refuse what the method cannot do.

        Raises:
            PlanError: a part of the goal is nothing that the method knows.
        """

    def takes(self, goal: Goal) -> Collection[str]:
        """Return the options of `OPTIONS` (`graphcomp/methods/takes.py`) that the method has a use for."""
        if goal.start is not None and self.calibrated:
            return START
        return of_activations(goal) if self.quantizes else ()

    def least_steps(self, goal: Goal, training: Training) -> int:
        """Return the fewest steps that a run takes."""
        return 1

    def taught(self, training: Training, model: nn.Module) -> Training:
        """Return the options of training, with a teacher where the method has one of its own.

        Args:
            model: as it was given, before any stage; not modified.
        """
        return training

    def prepare(self, source: Source, goal: Goal) -> Prepared:
        """Return the module to train: which views stand on which weights."""
        if not self.quantizes:
            return source()
        return source(bits=goal.bits, activation_bits=goal.activation_bits, start=goal.start)

    def search(self, ready: Prepared, goal: Goal, shown: Shown) -> None:  # noqa: B027 (most methods do not search)
        """Decide on data what goes, and let the module be so; called in eval mode, after `prepare`, where `searches`.

        Args:
            ready: what `prepare` returned.
            goal: what is asked.
            shown: data, and where the search is kept.
        """

    @abstractmethod
    def begin(self, ready: Prepared, goal: Goal, training: Training, steps: int) -> Run:
        """Begin a run.

        Args:
            ready: what `prepare` returned.
            goal: what is asked.
            training: the options of training, with those that were chosen for the model.
            steps: of the whole run.
        """


def refuse(method: Method, given: Mapping[str, bool], why: str) -> None:
    """Refuse options that a method has no use for.

    Args:
        given: option -> whether it was given.

    Raises:
        PlanError: one was.
    """
    if names := [name for name, value in given.items() if value]:
        raise PlanError(f"{', '.join(names)} with method={method.name!r}", why=why, fix='method="geta", or without')
