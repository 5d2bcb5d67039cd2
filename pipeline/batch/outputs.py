"""The arguments of `compile` for each output: one loss, loss weight and list of metrics each, read as Keras reads them.

loss=[a, b]           in the order of the outputs          {"main": a, "aux": b}    by their names
metrics={"main": [..]}    outputs that are left out have none
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import CompileError
from pipeline.saying import did_you_mean


@dataclass(frozen=True)
class OutputObjective:
    """Loss, loss weight and metrics of one output.

    Attributes:
        label: The output's name, as Keras calls it.
        loss: What `keras.Model.compile` takes for one output, or None.
        weight: The loss weight: a number, a variable or None.
        metrics: A list, or None.
        weighted_metrics: A list, or None.
    """

    label: str
    loss: Any = None
    weight: Any = None
    metrics: Any = None
    weighted_metrics: Any = None


def objectives(
    labels: Sequence[str], loss: Any, loss_weights: Any, metrics: Any, weighted_metrics: Any
) -> tuple[OutputObjective, ...]:
    """One objective per output.

    Args:
        labels: The outputs' names, in order.
        loss: For one output a loss; for several a list in their order, a dict by their names, or one for all of them.
        loss_weights: None, or as `loss`.
        metrics: For one output a metric or a list; for several a list with one entry per output, or a dict.
        weighted_metrics: As `metrics`.

    Raises:
        CompileError: Something does not fit the outputs; says which there are.
    """
    if len(labels) == 1:
        (label,) = labels
        weights = _single(loss_weights, label, "loss_weights")
        weight = None if weights is None else _number(weights, label)
        lists = [_flat(_single(given, label, "metrics", lists=True)) for given in (metrics, weighted_metrics)]
        return (OutputObjective(label, _single(loss, label, "loss"), weight, *lists),)
    for_all = loss is not None and not isinstance(loss, Mapping | list | tuple)
    losses = dict.fromkeys(labels, loss) if for_all else _each(labels, loss, "loss", complete=True)
    if for_all and isinstance(loss_weights, int | float):
        loss_weights = [loss_weights] * len(labels)
    weights = _each(labels, loss_weights, "loss_weights")
    lists = [_each(labels, metrics, "metrics"), _each(labels, weighted_metrics, "weighted_metrics")]
    return tuple(
        OutputObjective(
            label,
            losses.get(label),
            None if weights.get(label) is None else _number(weights[label], label),
            *(_flat(given.get(label)) for given in lists),
        )
        for label in labels
    )


def _single(given: Any, label: str, what: str, lists: bool = False) -> Any:
    """The one output's entry of something that may come as a list or dict."""
    if isinstance(given, Mapping):
        if set(given) - {label}:
            raise CompileError(f"{what} names {', '.join(map(repr, given))}, the pipeline's only output is {label!r}")
        return given.get(label)
    if not lists and isinstance(given, list | tuple):
        if len(given) != 1:
            raise CompileError(f"the pipeline has one output, {label!r}; received {len(given)} entries for {what}")
        return given[0]
    return given


def _each(labels: Sequence[str], given: Any, what: str, complete: bool = False) -> Mapping[str, Any]:
    if given is None:
        return {}
    known = f"the pipeline has {len(labels)} outputs ({', '.join(map(repr, labels))})"
    if isinstance(given, Mapping):
        for name in given:
            if name not in labels:
                raise CompileError(f"{known}, {what} names {name!r}{did_you_mean(str(name), labels)}")
        if complete and (missing := [label for label in labels if label not in given]):
            unsaid = ", ".join(map(repr, missing))
            raise CompileError(f"{known}, {what} says nothing of {unsaid}; give None for an output without a loss")
        return given
    if isinstance(given, list | tuple) and len(given) == len(labels):
        return dict(zip(labels, given, strict=True))
    received = f"{len(given)} entries" if isinstance(given, list | tuple) else repr(given)
    raise CompileError(f"{known}; give {what} as a list in this order or a dict by these names, received {received}")


def _flat(given: Any) -> Any:
    """Metrics of one output as a list."""
    if given is None or isinstance(given, list):
        return given
    return list(given) if isinstance(given, tuple) else [given]


def _number(weight: Any, label: str) -> Any:
    """A loss weight as a number; one that is a variable, which the user may assign, as it is."""
    try:
        return weight if hasattr(weight, "assign") else float(weight)
    except (TypeError, ValueError):
        raise CompileError(f"the loss weight of {label!r} must be a number, received {weight!r}") from None


def by_label(given: Any, labels: Iterable[str], with_loss: Iterable[str]) -> dict[str, Any] | None:
    """Targets or sample weights as the user gives them, by output; None if their number does not fit.

    Args:
        given: An array, or a list in the order of the outputs (or of those with a loss), or a dict by their names.
        labels: The outputs' names.
        with_loss: Those that are judged.
    """
    labels, judged = list(labels), list(with_loss)
    if len(labels) == 1 and isinstance(given, list | tuple) and len(given) == 1 and hasattr(given[0], "shape"):
        given = given[0]  # the only output's array in a list
    if isinstance(given, Mapping):
        return dict(given) if set(judged) <= set(given) <= set(labels) else None
    if len(labels) == 1 or (len(judged) == 1 and not isinstance(given, list | tuple)):
        return {judged[0]: given} if judged else {}
    if isinstance(given, list | tuple):
        for names in (labels, judged):
            if len(given) == len(names):
                return dict(zip(names, given, strict=True))
    return None
