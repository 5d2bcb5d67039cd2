"""`python -m tests.faults`: run the whole matrix and print it to docs/fault-matrix.md."""

from __future__ import annotations

import sys
from typing import TextIO

from tests import conftest  # noqa: F401 - sets the environment before TensorFlow is imported
from tests.faults import copies, shared
from tests.faults.cases import CASES, SCHEDULES
from tests.faults.healthy import verify_many
from tests.faults.matrix import Outcome, outcomes
from tests.faults.page import described, page, write
from tests.faults.proving import running

HEALTHY = 200


def main(out: TextIO = sys.stderr) -> int:
    """Write the page; 1 if anything was missed, misnamed or falsely reported."""
    found: dict[bool, list[Outcome]] = {True: [], False: []}
    models: dict[str, str] = {}
    for eager in found:
        for case in CASES:
            for schedule in SCHEDULES:
                with running(case, schedule, eager) as live:
                    models.setdefault(case, described(live))
                    mine = list(outcomes(live))
                found[eager] += mine
                mode = "eager" if eager else "compiled"
                print(f"{case}, {schedule}, {mode}: {sum(o.ok for o in mine)} of {len(mine)}", file=out, flush=True)
    alike = [one for case in CASES for check in shared.CHECKS for one in shared.run(case, check)]
    copied = list(copies.run())
    healthy = verify_many(HEALTHY)
    wrong = [*(str(o) for part in found.values() for o in part if not o.ok)]
    wrong += [f"MISSED: {one.fault} ({one.case}, {one.check}): {one.said}" for one in alike if not one.ok]
    wrong += [f"MISSED: {one.fault} ({one.case}): {one.said}" for one in copied if not one.ok]
    wrong += [f"FALSE ALARM: {alarm.configuration}: {alarm.said}" for alarm in healthy.alarms]
    print("\n".join(wrong), f"{healthy.count} healthy in {healthy.seconds:.0f} s", sep="\n", file=out)
    write(page(found[True], found[False], alike, copied, healthy, models))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
