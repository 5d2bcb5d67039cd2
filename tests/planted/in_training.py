"""Faults in updates, in loss scaling and in checkpoints."""

from __future__ import annotations

from tests.planted.planting import Planted

_STEPS, _HOSTED = "pipeline/runtime/step_runner.py", "stages/worker/hosted_stage.py"
_SAVING, _SCALING = "pipeline/saving/checkpoint.py", "pipeline/compiled/loss_scaling.py"
_OPTIMIZERS = ("test_exact_optimizers",)
_MIXED = ("test_means_the_same_mixed",)
_PER_STAGE = ("test_means_the_same_per_stage",)
_CHECKPOINT = ("test_checkpoint",)

OPTIMIZERS = (
    Planted(
        "clipping by the global norm takes its square",
        "pipeline/compiled/compiled.py",
        "norm = np.sqrt(loss_number(keras.ops.sum(",
        "norm = np.square(loss_number(keras.ops.sum(",
        _OPTIMIZERS,
    ),
    Planted(
        "the global norm counts a tied variable in every stage that has it",
        _HOSTED,
        "for k, g in enumerate(self.stage.as_given()) if g is not None and k not in self._others}",
        "for k, g in enumerate(self.stage.as_given()) if g is not None}",
        ("test_tied", *_OPTIMIZERS),
    ),
    Planted(
        "scaled gradients are not divided by the loss scale",
        _STEPS,
        "driver.apply(rates, scale, loss_scale, compiled.adjusted())",
        "driver.apply(rates, scale, None, compiled.adjusted())",
        _MIXED,
    ),
    Planted(
        "stages without an overflow update when another one overflows",
        "pipeline/batch/step.py",
        "finite=all(answer.finite for answer in answers)",
        "finite=any(answer.finite for answer in answers)",
        _MIXED,
    ),
    Planted(
        "the loss scale grows by four",
        _SCALING,
        "scale.assign(scale * 2.0)",
        "scale.assign(scale * 4.0)",
        _MIXED,
    ),
    Planted(
        "weight decay leaves nothing out that the optimizer was told by object",
        _HOSTED,
        "        if self.spec.undecayed:\n",
        "        if self.spec.undecayed is None:\n",
        _PER_STAGE,
    ),
    Planted(
        "a learning rate that a callback sets does not reach the stages",
        "stages/worker/worker.py",
        "hosted.optimizer.learning_rate = rate",
        "hosted.optimizer.learning_rate  # noqa: B018",
        ("test_callbacks", "test_compile"),
    ),
    Planted(
        "slots that begin as copies of the weights keep the first ones",
        _HOSTED,
        'if what in ("model", "weights") and self.optimizer is not None and not self._has_stepped():',
        'if what == "weights" and self.optimizer is not None and not self._has_stepped():',
        (*_OPTIMIZERS, "test_compile"),
    ),
    Planted(
        "the user's optimizer does not count updates",
        _STEPS,
        "compiled.adjusted())\n                compiled.count_update()\n",
        "compiled.adjusted())\n",
        ("test_callbacks", "test_compile"),
    ),
    Planted(
        "an optimizer per stage: all stages take the first one's rate",
        "pipeline/compiled/compiled.py",
        "each = rates if len(rates) > 1 else rates * stages",
        "each = rates[:1] * stages",
        _PER_STAGE,
    ),
)

CHANGES = (
    Planted(
        "a variable of a loss that is assigned does not reach the worker",
        "pipeline/own/changes.py",
        "if places := [k for k in held.changed() if id(held.variables[k]) not in states]:",
        "if places := [k for k in held.changed() if k < 0]:",
        ("test_changes",),
    ),
    Planted(
        "a compiled update keeps the optimizer's numbers that it was traced with",
        "stages/tape/compiled.py",
        'for name, found in self._functions.items() if name[0] != "apply"}',
        "for name, found in self._functions.items() if name}",
        ("test_changes",),
    ),
    Planted(
        "values that the own model is given between two fits stay there",
        "pipeline/own/changes.py",
        "        if closely:\n            self._take_model()",
        "        if closely is None:\n            self._take_model()",
        ("test_changes",),
    ),
)

CHECKPOINTS = (
    Planted(
        "under other cuts, optimizer slots stay at their old places",
        "pipeline/compiled/optimizer_slots.py",
        "self.of_variable.get(before, {}) for place, before in places.items()",
        "self.of_variable.get(place, {}) for place, before in places.items()",
        _CHECKPOINT,
    ),
    Planted(
        "a loaded pipeline counts updates from zero",
        _SAVING,
        "        compiled.go_on_from(state.slots)\n",
        "",
        _CHECKPOINT,
    ),
    Planted(
        "bfloat16 values are read as the integers that stand for them",
        "pipeline/saving/reading.py",
        "return array.view(np.dtype(getattr(ml_dtypes, dtype)))",
        "return array.astype(np.dtype(getattr(ml_dtypes, dtype)))",
        _CHECKPOINT,
    ),
    Planted(
        "a damaged file is loaded",
        "pipeline/saving/reading.py",
        'if hashlib.file_digest(content, "sha256").hexdigest() != entry["sha256"]:',
        'if not entry["sha256"]:',
        _CHECKPOINT,
    ),
    Planted(
        "a loaded pipeline begins with a new loss scale",
        _SAVING,
        'if compiled.loss_scaling is not None and training["loss_scaling"] is not None:',
        'if compiled.loss_scaling is not None and training["loss_scaling"] is None:',
        (*_CHECKPOINT, *_MIXED),
    ),
    Planted(
        "while a checkpoint is replaced, there is none",
        "pipeline/saving/folder.py",
        "    if _exchange(place, path):",
        "    if not path:",
        (*_CHECKPOINT, "test_failures_killed"),
    ),
)
