"""What pytest loads wherever Tapeline is installed: `pipeline.pytest_plugin`, or nothing where that would break a run.

A project of one's own may well have a folder `pipeline` (or `stages`, or `transport`) that hides ours; its tests have
nothing to do with us and must run. This name is nobody else's, so that pytest always finds what it was promised.
"""

from __future__ import annotations

from contextlib import suppress

with suppress(ImportError):
    from pipeline.pytest_plugin import assert_single_tape, pytest_addoption, pytest_runtest_makereport

__all__ = ["assert_single_tape", "pytest_addoption", "pytest_runtest_makereport"]
