"""The values of the workers' metrics, written into the user's own metric objects, where Keras would have counted them.

A worker counts in copies. Whoever reads an object that was given to `compile`, after `fit` or in a callback, finds the
value there; so does who looks at `self.model.metrics`. The same holds for metrics that layers of the own model update.
"""

from __future__ import annotations

import warnings
from typing import Any

import keras

from pipeline.compiled.compiled import Compiled
from pipeline.runtime.session import Session
from stages.tape.model_call import metrics_of_layers


def own_metrics(compiled: Compiled) -> list[Any]:
    """The metric objects that `compile` was given, each once."""
    found = {id(own): own for own, _ in compiled.metric_copies}
    return list(found.values())


def reset(compiled: Compiled) -> None:
    """Let the user's objects, and those that stand for the workers' here, count from zero."""
    for metric in own_metrics(compiled):
        metric.reset_state()
    for head in compiled.heads.values():
        head.reset()


def any_of_users_classes(compiled: Compiled) -> bool:
    """Whether one of the user's metric objects is of no class of Keras's."""
    return any(not type(own).__module__.startswith("keras.") for own, _ in compiled.metric_copies)


def are_any(session: Session) -> bool:
    """Whether anything counts: metrics that `compile` was given, or those of layers, as far as they are known here."""
    models, compiled = session.setup.models, session.workers.compiled
    if len(models) < len(session.setup.segments) or any(model.metrics_variables for model in models.values()):
        return True
    return compiled is not None and compiled.has_metrics


def fetch(session: Session, compiled: Compiled) -> None:
    """Give the metrics of this process the workers' values."""
    if not are_any(session):
        return
    driver = session.workers.driver()
    for stage, values in session.values.read("metrics").items():
        labels = [head.label for head in driver.specs[stage].heads]
        here = [variable for label in labels for variable in compiled.heads[label].variables]
        model = session.setup.models.get(stage)
        inner = [] if model is None else metrics_of_layers(model)
        here += [variable for metric in inner for variable in metric.variables]
        if len(here) == len(values):  # or a metric that has seen no batch yet
            for variable, value in zip(here, values, strict=True):
                variable.assign(value)
    for own, copy in compiled.metric_copies:
        for variable, value in zip(own.variables, copy.variables, strict=False):
            variable.assign(value)
    if not compiled.metrics_named and all(head.built for head in compiled.heads.values()):
        compiled.metrics_named = True
        _name_those_without_variables(compiled)


def build(compiled: Compiled, label: str, target: Any, prediction: Any) -> None:
    """Make the variables of an output's metrics from one example, without counting it."""
    compiled.heads[label].build(target, prediction, None)
    for own, copy in compiled.metric_copies:
        if len(own.variables) < len(copy.variables):
            own.update_state(target, prediction)
            own.reset_state()


def _name_those_without_variables(compiled: Compiled) -> None:
    """Warn of the user's objects that no value of the workers can be written into."""
    for own in own_metrics(compiled):
        if not own.variables:
            warnings.warn(
                f"the metric {own.name!r} ({type(own).__name__}) counts in attributes of Python and not in variables: "
                "its value is in the logs and the history, and the object in this process does not count",
                stacklevel=2,
            )


def reads_every_batch(callbacks: Any) -> bool:
    """Whether a callback that is not Keras's own may look at metrics after a batch."""
    given = getattr(callbacks, "callbacks", callbacks)
    flat = [] if given is None else keras.tree.flatten(given)
    return any(
        isinstance(one, keras.callbacks.LambdaCallback) or not type(one).__module__.startswith("keras.") for one in flat
    )
