"""Clocks of several processes laid over each other by what they sent to each other.

Nothing arrives before it was sent. So a message from a to b that left at t on the clock of a and was there at u on the
clock of b says that the clock of b is ahead of that of a by at most u - t. Processes of one host share one monotonic
clock, and then no message contradicts offsets of zero: they stay zero, to the last bit. Where one does (another host, a
time namespace of a container's own), that clock is put in the middle of what all messages together leave open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["clock_offsets"]


def clock_offsets(clocks: int, ahead: Mapping[tuple[int, int], float]) -> tuple[float, ...]:
    """By how many seconds each clock is ahead of the first.

    Args:
        clocks: How many there are.
        ahead: {(a, b): the most seconds by which clock b can be ahead of clock a}.

    Returns:
        One offset a clock, all 0.0 where nothing speaks against it; else no bound is exceeded by them, as long as the
        bounds do not contradict each other. A clock that nothing is known of keeps 0.0.
    """
    if all(most >= 0 for most in ahead.values()):
        return (0.0,) * clocks
    # The shortest way along the bounds is the tightest bound.
    way: list[list[float]] = [
        [0.0 if a == b else ahead.get((a, b), math.inf) for b in range(clocks)] for a in range(clocks)
    ]
    for by in range(clocks):
        for a in range(clocks):
            for b in range(clocks):
                way[a][b] = min(way[a][b], way[a][by] + way[by][b])
    offsets = [0.0]
    for clock in range(1, clocks):
        offset = _between(-way[clock][0], way[0][clock])
        offsets.append(offset)
        way[0][clock], way[clock][0] = offset, -offset  # what is chosen for one clock narrows the others
        for a in range(clocks):
            for b in range(clocks):
                over = min(way[a][0] + offset + way[clock][b], way[a][clock] - offset + way[0][b])
                way[a][b] = min(way[a][b], over)
    return tuple(offsets)


def _between(least: float, most: float) -> float:
    """Zero if it is between the two, else their middle, or the one that is finite."""
    if least <= 0.0 <= most:
        return 0.0
    if math.isinf(least) or math.isinf(most):
        return most if math.isinf(least) else least
    return (least + most) / 2
