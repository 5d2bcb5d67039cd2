"""The user's changes while training: taken along to the workers, or refused by name.

    variables of losses, loss weights      compared before every step; new values go to the workers
    numbers in the optimizer, its count    compared before every step; set in the workers' optimizers
    slots of the own model's optimizer     compared where a call or an epoch begins; new values go to the workers, if
                                           these have trained nothing that it does not know
    the own model's variables              compared where a call or an epoch begins; new values go to the workers, if
                                           these have trained nothing that the own model does not know
    other attributes: a rate, a factor     some compared before every step, all where a call or an epoch begins; refused

Workers have copies of the user's objects. What is compared is kept when they get them, and costs little: variables are
compared by where their values lie (`pipeline.own.held`), attributes by identity.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from pipeline.compiled.compiled import slots_with
from pipeline.errors import CompileError
from pipeline.own.held import Held
from pipeline.runtime.values import digest
from stages.keras_internals import layers_of, own_other_variables, own_seed_generators
from stages.keras_training_internals import variables_known_to
from stages.plain_attributes import Attributes, plain
from stages.recipe.optimizer_state import rate_of
from stages.tape.model_call import states_of_layers
from stages.worker import snapshot

if TYPE_CHECKING:
    from pipeline.runtime.session import Session

_AT_ONCE = 40
"""So many attributes are compared before a step, in turn."""
_NO_NUMBERS = ("name", "built", "loss_scale_factor")
_AGAIN = "call pipe.compile(...) again, which keeps all weights, and the state of an optimizer that is the same object"


class Changes:
    """Looks at what the user may have changed.

    Args:
        session: What runs.

    Attributes:
        closely: Whether the next look compares all attributes, and the own model's variables.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._filled = False
        self.closely = self._due = True

    def hold(self) -> None:
        """Keep what the workers have just got from the user's objects, to compare with."""
        session, compiled = self._session, self._session.workers.compiled
        by_hand = _set_by_hand(session)
        quiet = {id(variable) for variable in by_hand}
        own = {id(v): v for m in session.setup.models.values() for v in m.variables if id(v) not in quiet}
        self._model, self._quiet = Held(list(own.values())), Held(by_hand)
        self._besides = {i: Held(some) for i, some in session.workers.given.items() if some}
        self._hold_states()
        self._attributes = Attributes(_objects(session))
        self._optimizers = [] if compiled is None else [one for one in compiled.updating if one is not None]
        self._numbers = [_numbers(one) for one in self._optimizers]
        self._rates = [rate_of(one) for one in self._optimizers]
        self._hold_slots()
        self._told_of_trainable = False
        self._filled, self.closely = True, True

    def hold_model(self) -> None:
        """Keep the values that the own model, and its optimizer, were just given by the workers."""
        if self._filled:
            self._model, self._quiet = Held(self._model.variables), Held(self._quiet.variables)
            self._hold_states()
            self._hold_slots()

    def take_over(self, values: Mapping[int, Sequence[np.ndarray[Any, Any]]]) -> None:
        """Assign the user's variables of losses, loss weights and layers, of which the workers have values already.

        Args:
            values: {stage: their values, in the order of `Workers.besides`}.
        """
        for i, variables in self._session.workers.besides().items():
            snapshot.write(variables, values[i], "the user's own variables")
        if self._filled:
            self._besides = {i: Held(held.variables) for i, held in self._besides.items()}
            self._hold_states()

    def _hold_states(self) -> None:
        found = {i: states_of_layers(model) for i, model in self._session.setup.models.items()}
        self._states = {i: Held(states) for i, states in found.items() if states}

    def _hold_slots(self) -> None:
        """Keep what the optimizers in this process know: their counts, and slots where they know the own variables."""
        if (compiled := self._session.workers.compiled) is not None:
            compiled.counts.hold()
        known = [one for one in self._optimizers if variables_known_to(one)]
        self._slots = Held([v for one in known for v in one.variables if v.name not in ("iteration", "learning_rate")])

    @contextmanager
    def calling_own(self) -> Iterator[None]:
        """The user's own objects run in this process meanwhile; what that makes of them, counters, is no change.

        Raises:
            CompileError: An attribute was changed before, which would be taken for what the run made of it.
        """
        self._refuse_attributes(None)
        try:
            yield
        finally:
            if self._filled:
                self._attributes = Attributes(_objects(self._session))

    @contextmanager
    def looked(self) -> Iterator[None]:
        """The next look inside is none: one was made just before, and nobody could change anything since."""
        self._due = self.closely = False
        try:
            yield
        finally:
            self._due = True

    def look(self, closely: bool = False, training: bool = False) -> None:
        """Take along, or refuse, what was changed since the last look.

        Args:
            closely: Whether to compare all attributes, and the own model's variables.
            training: Whether a training begins, for which layers frozen since compile() are told, too.

        Raises:
            CompileError: Something was changed that cannot take effect; says what.
        """
        due, self._due = self._due, True
        if not due or not self._filled or not self._session.workers.are_running:
            return
        closely, self.closely = closely or self.closely, False
        self.take_variables()
        self._take_numbers()
        self._refuse_attributes(None if closely else _AT_ONCE)
        if closely:
            self._take_model()
            self._take_slots()
        if closely and training:
            self._warn_of_trainable()

    def _refuse_attributes(self, most: int | None) -> None:
        """Refuse a changed attribute; as many are compared as `Attributes.changed` is told."""
        if self._filled and (found := self._attributes.changed(most)) is not None:
            raise CompileError(f"{found} after compile(), and the workers' copy is still as it was; {_AGAIN}")

    def take_variables(self) -> None:
        """Give the workers new values of variables that nothing but the user changes.

        Raises:
            CompileError: The workers changed such a variable too.
        """
        if self._filled:
            self._take_besides()
            self._take_states()
            self._take_quiet()

    def _take_besides(self) -> None:
        """Give the workers new values of variables of losses and loss weights, and of layers' untracked ones."""
        states = {id(state) for held in self._states.values() for state in held.variables}
        for i, held in self._besides.items():
            if places := [k for k in held.changed() if id(held.variables[k]) not in states]:
                self._set_some("besides", i, held, places)
                self._session.reference.close("a variable of a loss was changed")

    def _take_states(self) -> None:
        """Give the workers states that the user gave stateful layers, ``layer.reset_state()`` among them.

        That assigns zeros, which an own layer may have had all the time, while the workers' went on.
        """
        for i, held in self._states.items():
            if places := held.assigned():
                self._set_some("layer states", i, held, places)

    def _set_some(self, group: str, stage: int, held: Held, places: Sequence[int]) -> None:
        """Give a worker these of a group's variables; the others keep what they have there."""
        driver = self._session.workers.driver()
        values = list(driver.get(group)[stage])
        for k in places:
            (values[k],) = snapshot.read([held.variables[k]])
        driver.set(group, {stage: values})

    def _take_quiet(self) -> None:
        """Give the workers new values of variables of layers that training leaves as they are.

        Raises:
            CompileError: The workers changed such a variable themselves, so that the user's value is none of theirs.
        """
        before = [np.asarray(tensor).tobytes() for tensor in self._quiet.tensors]
        for k in self._quiet.changed():
            variable, driver = self._quiet.variables[k], self._session.workers.driver()
            for i, model in self._session.setup.models.items():
                for place, one in enumerate(model.variables):
                    if one is not variable:
                        continue
                    (there,) = driver.get(f"model {place}")[i]
                    if there is None or there.tobytes() not in (before[k], snapshot.read([variable])[0].tobytes()):
                        raise CompileError(_in_vain([variable]))
                    driver.set(f"model {place}", {i: snapshot.read([variable])})

    def _take_numbers(self) -> None:
        """Set changed numbers of the user's optimizers in those of the workers."""
        for place, optimizer in enumerate(self._optimizers):
            before, now = self._numbers[place], _numbers(optimizer)
            if rate_of(optimizer) is not self._rates[place] and not isinstance(rate_of(optimizer), keras.Variable):
                raise CompileError(f"the optimizer got another learning rate schedule after compile(); {_AGAIN}")
            if now == before:
                continue
            new = {name: value for name, value in now.items() if name not in before or before[name] != value}
            self._refuse_other_slots(optimizer, before, new)
            compiled = self._session.workers.needs_compile("training")
            compiled.global_clipnorm = now.get("global_clipnorm", compiled.global_clipnorm)
            set_there = {name: value for name, value in new.items() if name != "global_clipnorm"}
            compiled.adjust(place, set_there)
            self._session.reference.close("an optimizer was changed")
            self._numbers[place] = now
        judged = self._session.workers.compiled
        if judged is not None and (counts := judged.counts.set_by_hand(len(self._session.setup.segments))):
            self._session.workers.driver().set("count", {stage: [count] for stage, count in counts.items()})

    def _refuse_other_slots(self, optimizer: Any, before: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        """Refuse a number that decides which variables an optimizer keeps beside those that it trains."""
        slots = [slots_with(optimizer, {name: before.get(name) for name in new}), slots_with(optimizer, new)]
        if slots[0] != slots[1]:
            names = ", ".join(f"{name}={value!r}" for name, value in new.items())
            raise CompileError(
                f"the optimizer got {names} after compile(), with which it would keep other variables than it has; "
                "compile with a new optimizer object"
            )

    def _warn_of_trainable(self) -> None:
        """Say once that layers were frozen or thawed and no compile() has followed."""
        if not self._told_of_trainable and self._session.workers.trainable_has_changed:
            self._told_of_trainable = True
            warnings.warn(
                "layer.trainable was changed after compile(), which takes effect with the next compile(), as Keras "
                "documents: the workers train the variables of before",
                stacklevel=4,
            )

    def _take_slots(self) -> None:
        """Give the workers what the user assigned to slots of an optimizer that was built for the own model.

        Raises:
            CompileError: The workers have newer values of them.
        """
        if not (changed := self._slots.changed()):
            return
        if self._session.values.ahead:
            name = self._slots.variables[changed[0]].path
            raise CompileError(
                f"the optimizer's variable {name!r} was assigned while the workers have newer values of all that it "
                "keeps; assign it before the first training, or after fit has ended, or compile with a new optimizer"
            )
        self._session.workers.take_slots()
        self._hold_slots()

    def _take_model(self) -> None:
        """Give the workers values that the user's own model was given, unless they have newer ones of the rest."""
        changed = [self._model.variables[k] for k in self._model.changed()]
        if not changed:
            return
        values = self._session.values
        if values.ahead:
            if all(digest(variable) in values.told for variable in changed):
                return  # a copy of the pipeline's weights, to look at
            raise CompileError(_in_vain(changed))
        ids = {id(variable) for variable in changed}
        models = self._session.setup.models
        touched = {i for i, model in models.items() if any(id(variable) in ids for variable in model.variables)}
        self._session.workers.driver().set("model", {i: snapshot.read(models[i].variables) for i in sorted(touched)})


def _objects(session: Session) -> Iterator[tuple[str, Any]]:
    """What the workers have copies of, each with what it is called."""
    for model in session.setup.models.values():
        for layer in layers_of(model, include_self=False):
            yield f"the layer {layer.name!r}", layer
        for variable in model.trainable_variables:
            yield f"the variable {variable.path!r}", variable
    compiled = session.workers.compiled
    if compiled is None:
        return
    for one in compiled.objectives:
        if one.loss is not None and not isinstance(one.loss, str):
            yield f"the loss {getattr(one.loss, '__name__', type(one.loss).__name__)}", one.loss
        for metric in [*(one.metrics or ()), *(one.weighted_metrics or ())]:
            if not isinstance(metric, str):
                yield f"the metric {getattr(metric, 'name', getattr(metric, '__name__', metric))}", metric
    for optimizer in compiled.updating:
        rate = None if optimizer is None else rate_of(optimizer)
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            yield f"the learning rate schedule {type(rate).__name__}", rate


def _numbers(optimizer: Any) -> dict[str, Any]:
    """What of an optimizer decides about its updates."""
    return {name: value for name, value in plain(optimizer).items() if name not in _NO_NUMBERS}


def _in_vain(variables: Sequence[Any]) -> str:
    names = ", ".join(repr(snapshot.path_of(variable)) for variable in variables[:3])
    return (
        f"the own model's variable {names} was assigned while the workers have newer values of the model; set it "
        "there: weights = pipe.get_weights(); ...; pipe.set_weights(weights) (in a callback self.model.set_weights)"
    )


def _set_by_hand(session: Session) -> list[Any]:
    """Variables of the user's own layers that no gradient trains: factors that a callback may set."""
    found = {}
    for model in session.setup.models.values():
        seeds = {id(generator.state) for layer in layers_of(model) for generator in own_seed_generators(layer)}
        for layer in layers_of(model, include_self=False):
            if type(layer).__module__.split(".")[0] not in ("keras", "stages"):
                for variable in own_other_variables(layer):
                    if id(variable) not in seeds:
                        found[id(variable)] = variable
    return list(found.values())


__all__ = ["Changes"]
