"""Faults in what goes from stage to stage, in windows of time, and in plans."""

from __future__ import annotations

from tests.planted.planting import Planted

_PROGRAM, _CALL = "stages/worker/step_program.py", "stages/tape/model_call.py"
_STATES, _RULES = "stages/tape/window_states.py", "pipeline/plan/rules.py"
_ZERO_BUBBLE = "pipeline/plan/schedules/zero_bubble.py"
_MASKS = ("test_masks",)
_WINDOWS = ("test_carried", "test_windows")
_PLAN_RULES = ("test_plan_rules",)

WIRING = (
    Planted(
        "a mask is not sent over a cut",
        _PROGRAM,
        "with_it = mask is not None and (name, consumer) not in hosted.unmasked",
        "with_it = False",
        _MASKS,
    ),
    Planted(
        "a mask is sent to a stage that finds none in one process",
        _PROGRAM,
        "with_it = mask is not None and (name, consumer) not in hosted.unmasked",
        "with_it = mask is not None",
        _MASKS,
    ),
    Planted(
        "a mask that arrived is not put on its tensor",
        _CALL,
        "            values[place] = with_mask(values[place], mask)\n        structure",
        "            pass\n        structure",
        _MASKS,
    ),
    Planted(
        "an embedding that masks is not looked at for masks",
        "stages/worker/hosted_stage.py",
        'isinstance(layer, keras.layers.Masking) or getattr(layer, "mask_zero", False)',
        "isinstance(layer, keras.layers.Masking)",
        _MASKS,
    ),
    Planted(
        "a layer with statistics may be used in two stages",
        "pipeline/cutting/splitter.py",
        "if apart and isinstance(layer, keras.Layer) and changes_by_itself(layer):",
        "if apart and not isinstance(layer, keras.Layer) and changes_by_itself(layer):",
        ("test_splitter", "test_tied"),
    ),
    Planted(
        "weights come in the order of the stages, not of the model that was split",
        "pipeline/runtime/values.py",
        "list(uses.values()) if original is None else [uses[id(weight)] for weight in original.weights]",
        "list(uses.values())",
        ("test_several_outputs", "test_checkpoint", "test_fit"),
    ),
    Planted(
        "a tensor reaches the first of its consumers only",
        "pipeline/model/wiring.py",
        "tuple(j for j, taken in enumerate(inputs) if name in taken)",
        "tuple(j for j, taken in enumerate(inputs) if name in taken)[:1]",
        ("test_wiring",),
    ),
    Planted(
        "targets given as a list go to the outputs in reverse",
        "pipeline/batch/outputs.py",
        "            if len(given) == len(names):\n                return dict(zip(names, given, strict=True))",
        "            if len(given) == len(names):\n                return dict(zip(names, given[::-1], strict=True))",
        ("test_several_outputs",),
    ),
)

WINDOWS = (
    Planted(
        "truncation cuts one window too early",
        _STATES,
        "cut = self.block is not None and (window + 1) % self.block == 0",
        "cut = self.block is not None and window % self.block == 0",
        _WINDOWS,
    ),
    Planted(
        "no gradient goes from a window to the one before it",
        _STATES,
        "self._ways[microbatch, True].gradients[window - 1] = list(found)",
        "self._ways[microbatch, True].gradients[window - 1] = [None] * len(found)",
        _WINDOWS,
    ),
    Planted(
        "regularisers count in every window",
        _CALL,
        "losses[: len(losses) - self.regularised] if window else losses",
        "losses",
        _WINDOWS,
    ),
    Planted(
        "states are not kept for the next batch",
        _STATES,
        "        if self.persists:\n",
        "        if self.persists and not training:\n",
        _WINDOWS,
    ),
    Planted(
        "a window that begins masked gives zeros, not the output before it",
        "pipeline/model/stateful.py",
        "if mask is not None and not layer.zero_output_for_mask:",
        "if mask is not None and layer.zero_output_for_mask is None:",
        ("test_whole_length", *_WINDOWS),
    ),
    Planted(
        "windows of unequal length weigh the same",
        "stages/grid.py",
        "self.sizes[microbatch] * (self.lengths[window] if over_time and self.lengths else 1)",
        "self.sizes[microbatch]",
        _WINDOWS,
    ),
)

PLANS = (
    Planted(
        "a worker takes weight halves before what others wait for",
        _ZERO_BUBBLE,
        "(Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT),",
        "(Kind.BACKWARD_WEIGHT, Kind.FORWARD, Kind.BACKWARD_INPUT),",
        ("test_zero_bubble",),
    ),
    Planted(
        "zero bubble counts a tape as closed once its input half is done",
        "pipeline/plan/schedules/greedy.py",
        "-1 if whole or kind is _WEIGHT else 0",
        "-1 if kind is _INPUT else 0",
        ("test_zero_bubble",),
    ),
    Planted(
        "1F1B holds one tape more than it says",
        "pipeline/plan/schedules/one_f_one_b.py",
        "_program(some, count, every)",
        "_program(some, min(count + 1, len(every)), every)",
        ("test_plan_schedules",),
    ),
    Planted(
        "GPipe goes backward in descending order",
        "pipeline/plan/schedules/gpipe.py",
        "backwards(stage, every)",
        "backwards(stage, every[::-1])",
        ("test_plan_schedules",),
    ),
    Planted(
        "a plan may go backward in any order",
        _RULES,
        "if action.microbatch < before.microbatch:",
        "if action.microbatch < 0:",
        _PLAN_RULES,
    ),
    Planted(
        "workers that wait for each other for ever are not seen before launch",
        _RULES,
        "if not clock.blocked:",
        "if clock is not None:",
        _PLAN_RULES,
    ),
    Planted(
        "a plan may hold more tapes than it says",
        _RULES,
        "if peak <= bound:",
        "if peak >= 0:",
        _PLAN_RULES,
    ),
    Planted(
        "a large plan may go backward in any order",
        "pipeline/plan/arrays.py",
        "[same] >= 0).all()",
        "[same] >= -9).all()",
        ("test_arrays",),
    ),
    Planted(
        "a large plan's messages take no time",
        "pipeline/plan/arrays.py",
        "ends[self.needs[now]] + delays[now]",
        "ends[self.needs[now]]",
        ("test_arrays",),
    ),
    Planted(
        "a schedule is chosen that does not fit into the memory",
        "pipeline/cutting/auto_schedule.py",
        "max(one.bytes) <= wanted.memory",
        "min(one.bytes) <= 8 * wanted.memory",
        ("test_auto_schedule",),
    ),
    Planted(
        "a backward waits for the first of its consumers only",
        "stages/actions.py",
        "*(gradient(sink, window) for sink in wiring.downstream(stage))",
        "*(gradient(sink, window) for sink in wiring.downstream(stage)[:1])",
        ("test_actions",),
    ),
    Planted(
        "under truncation a backward waits for the window behind the cut",
        "stages/actions.py",
        "(truncate is None or (window + 1) % truncate)",
        "(truncate is None or window % truncate)",
        ("test_actions", *_PLAN_RULES),
    ),
)
