"""Faults in tapes, in the sums over microbatches, and in what a microbatch weighs."""

from __future__ import annotations

from tests.planted.planting import Planted

_EAGER, _COMPILED = "stages/tape/eager.py", "stages/tape/compiled.py"
_TRACES, _HALVES = "stages/tape/traces.py", "stages/tape/backward_halves.py"
_ACCUMULATE, _PROGRAM = "stages/tape/accumulate.py", "stages/worker/step_program.py"
_STAGE = ("test_stage", "test_compiled")
_EXACT = ("test_exact_eager", "test_exact_compiled")
_OWN = ("test_exact_own_losses", *_STAGE)
_TIED = ("test_tied",)
_WHOLE = ("test_loss", "test_whole_batch")

TAPES = (
    Planted(
        "own losses weigh the same in unequal microbatches",
        _EAGER,
        "[share * self.loss_scale] * len(own)",
        "[self.loss_scale] * len(own)",
        _OWN,
    ),
    Planted(
        "recomputing draws another dropout mask",
        _EAGER,
        "            record.states.write(record.before)\n",
        "",
        ("test_stage", "test_exact_eager"),
    ),
    Planted(
        "recomputing leaves the statistics of the earlier pass",
        _EAGER,
        "            record.states.write(now)\n            record",
        "            record",
        ("test_stage", "test_exact_eager"),
    ),
    Planted(
        "outputs and losses of one stage meet in TensorFlow's order, not in one tape's",
        _EAGER,
        "range(_DISTANCE if losses else 0)",
        "range(0)",
        ("test_several_outputs", "test_random_graphs"),
    ),
    Planted(
        "compiled, metrics count a recomputed pass twice",
        _TRACES,
        "self._taped(arguments, layout, counts=False)\n            found",
        "self._taped(arguments, layout, counts=True)\n            found",
        ("test_several_outputs",),
    ),
    Planted(
        "compiled, own losses of a stage that others follow weigh the same in unequal microbatches",
        _COMPILED,
        "seeds.append(scalar(opened.share * self.loss_scale))",
        "seeds.append(scalar(self.loss_scale))",
        _OWN,
    ),
    Planted(
        "compiled, own losses of the last stage weigh the same in unequal microbatches",
        _TRACES,
        "[tf.cast(share * scale, term.dtype) for term in own]",
        "[tf.cast(scale, term.dtype) for term in own]",
        _OWN,
    ),
    Planted(
        "compiled, the sums of one step stay for the next",
        _COMPILED,
        "for i in reached:\n                self._accumulators[i].assign(tf.zeros_like",
        "for i in reached[:0]:\n                self._accumulators[i].assign(tf.zeros_like",
        ("test_compiled", "test_exact_compiled"),
    ),
    Planted(
        "compiled, no gradient becomes zeros",
        _COMPILED,
        "self._accumulators[i].read_value() if self._reached[i] else None",
        "self._accumulators[i].read_value()",
        (*_STAGE, "test_explain"),
    ),
)

HALVES = (
    Planted(
        "the weight half takes what the input half left in another order",
        _HALVES,
        "*found[self.results :]]",
        "*found[self.results :][::-1]]",
        ("test_backward_halves",),
    ),
    Planted(
        "the weight half of a microbatch takes the kept tensors of another",
        _COMPILED,
        "half = self._halfway.pop(key)",
        "half = self._halfway.pop(next(iter(self._halfway)))",
        ("test_backward_halves",),
    ),
    Planted(
        "eager, the weight half of a microbatch adds up the gradients of another",
        _EAGER,
        "variables, found = self._found.pop(key)",
        "variables, found = self._found.pop(next(iter(self._found)))",
        ("test_backward_halves",),
    ),
    Planted(
        "compiled, the weight half is left out",
        _COMPILED,
        "if half is not None:",
        "if half is not None and not half.left:",
        ("test_backward_halves",),
    ),
    Planted(
        "what a custom gradient does besides is lost between the halves",
        _HALVES,
        ", *(op.name for op in effects)}",
        "}",
        ("test_backward_halves",),
    ),
)

SUMS = (
    Planted(
        "a window's gradient takes the place of the later window's",
        _ACCUMULATE,
        "total = list(gradients) if so_far is None else [plus(a, b) for a, b in zip(so_far, gradients, strict=True)]",
        "total = list(gradients)",
        ("test_accumulate",),
    ),
    Planted(
        "a gradient that only a later microbatch has is lost",
        _ACCUMULATE,
        "    return [plus(x, y, i in fixed_rows) for i, (x, y) in enumerate(zip(a, b, strict=True))]",
        "    return [x if x is None else plus(x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]",
        ("test_accumulate",),
    ),
    Planted(
        "the sums of one step stay for the next",
        _ACCUMULATE,
        "self._sums, self._next = None, 0\n        self._early.clear()",
        "self._next = 0\n        self._early.clear()",
        ("test_accumulate",),
    ),
    Planted(
        "uses of a tied variable are added in the order of the stages, not of one tape",
        "stages/worker/tied_gradients.py",
        "reduce(plus, reversed(uses))",
        "reduce(plus, uses)",
        _TIED,
    ),
    Planted(
        "a copy of a tied variable updates by its own part",
        "stages/worker/tied_gradients.py",
        "stage.stage.replace([tie.place], [_take_gradient(take, index, tie.stages[0], tie.name, 0, shape)])",
        "_take_gradient(take, index, tie.stages[0], tie.name, 0, shape)",
        _TIED,
    ),
    Planted(
        "the regulariser of a tied variable counts in every stage that has it",
        "stages/worker/hosted_stage.py",
        "self.stage.trainable_variables[tie.place].regularizer = None",
        "self.stage.trainable_variables[tie.place].regularizer  # noqa: B018",
        _TIED,
    ),
    Planted(
        "gradients of several consumers are added in the order of the stages, not of one tape",
        _PROGRAM,
        "for consumer in reversed(consumers):",
        "for consumer in consumers:",
        ("test_exact_parts", "test_random_graphs", "test_wiring"),
    ),
    Planted(
        "the reference weighs own losses of unequal microbatches the same",
        "pipeline/reference/one_tape/single_tape.py",
        "share = tf.constant(size / batch.grid.samples, float_of_losses())",
        "share = tf.constant(1 / len(batch.grid.sizes), float_of_losses())",
        ("test_matrix_1f1b", "test_verify", *_OWN),
    ),
)

WEIGHTS = (
    Planted(
        "own losses are means over microbatches, however many samples these have",
        _PROGRAM,
        "share = self.grid.sizes[k] / self.grid.samples",
        "share = 1 / len(self.grid.sizes)",
        _OWN,
    ),
    Planted(
        "the loss is the mean over microbatches, however much these count",
        "stages/loss/head.py",
        "tuple(share / total if total else 0.0 for share in shares)",
        "tuple(1 / len(shares) if total else 0.0 for share in shares)",
        _WHOLE,
    ),
    Planted(
        "masked elements count in what a microbatch weighs",
        _PROGRAM,
        "hosted.prediction_masks.get(head.place),",
        "None,",
        ("test_masks",),
    ),
    Planted(
        "elements of an ignored class count in what a microbatch weighs",
        "stages/loss/head.py",
        "valid = None if ignored is None else np.asarray(target) != ignored",
        "valid = None",
        _WHOLE,
    ),
    Planted(
        "losses are added up without their loss weights",
        "stages/loss/heads.py",
        "value if head.weight is None else value * rounded_once(head.weight, value.dtype)",
        "value",
        ("test_several_outputs",),
    ),
    Planted(
        "the loss that is told leaves loss weights out",
        "pipeline/batch/step.py",
        "loss_number(1.0 if weight is None else weight)",
        "loss_number(1.0)",
        ("test_several_outputs",),
    ),
    Planted(
        "the smaller microbatches come first",
        "pipeline/batch/microbatch.py",
        "(smaller + 1,) * larger + (smaller,) * (count - larger)",
        "(smaller,) * (count - larger) + (smaller + 1,) * larger",
        ("test_microbatch",),
    ),
    Planted(
        "an epoch's loss is the mean over batches, the smaller last one included",
        "pipeline/training/running_logs.py",
        "loss_number(value) * loss_number(samples)",
        "loss_number(value)",
        ("test_fit",),
    ),
    Planted(
        "a loss over the whole batch does not see the predictions' masks",
        "stages/loss/heads.py",
        "place: None if some[0] is None else tf.concat(some, axis=0)",
        "place: None",
        ("test_masks", *_WHOLE),
    ),
    Planted(
        "a loss of one's own is tried by its value alone, not by its gradient",
        "stages/loss/trial.py",
        "abs(sum(terms) - whole) <= APART * size and _same(joined, gradient)",
        "abs(sum(terms) - whole) <= APART * size",
        ("test_meaning", "test_trial"),
    ),
    Planted(
        "a sum of one's own weighs in each microbatch what a mean would",
        "stages/loss/head.py",
        "if reduction in _SUMS or self.ways.loss is Way.SUM:",
        "if reduction in _SUMS:",
        ("test_meaning",),
    ),
    Planted(
        "a metric of a whole batch counts every microbatch in compiled stages",
        _TRACES,
        "        if not self._heads.counts_at_once:\n            self._heads.update(outputs, objective)",
        "        if self._heads:\n            self._heads.update(outputs, objective)",
        ("test_meaning",),
    ),
    Planted(
        "a loss over the whole batch is not scaled before it is differentiated",
        "stages/loss/heads.py",
        "seeds = [tf.fill((), rounded_once(loss_scale, term.dtype)) for term in terms]",
        "seeds = [tf.ones((), term.dtype) for term in terms]",
        ("test_means_the_same_mixed", *_WHOLE),
    ),
)
