"""A job may carry code: the memory that it lies in is open to the user's own processes alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from stages.process.job import job_of_bytes, job_to_bytes

READING = """
import os, sys
try:
    os.setgid(65534); os.setuid(65534)
except PermissionError:
    pass  # not root: the mode of the folder, which is looked at too, is what keeps others out
for name in sys.argv[1:]:
    try:
        print(os.getuid(), len(open(name, "rb").read()))
    except PermissionError:
        print("refused")
"""


def reading(*names: Any) -> list[str]:
    """What a process of nobody's reads of files; without root, one of the same user's."""
    ran = subprocess.run(
        [sys.executable, "-c", READING, *names], capture_output=True, text=True, timeout=60, check=True
    )
    return ran.stdout.splitlines()


def test_another_user_of_the_host_cannot_read_a_job() -> None:
    job = {"name": "w", "objects": b"code"}
    descriptor = os.memfd_create("tapeline-job")
    try:
        os.write(descriptor, job_to_bytes(job))
        place = f"/proc/{os.getpid()}/fd/{descriptor}"
        folder = Path(place).parent.stat()
        assert folder.st_uid == os.getuid() and folder.st_mode & 0o077 == 0
        found = reading(place)
        assert found == (["refused"] if os.getuid() == 0 else [f"{os.getuid()} {len(job_to_bytes(job))}"])
        os.lseek(descriptor, 0, os.SEEK_SET)
        assert job_of_bytes(os.read(descriptor, 4096)) == job
    finally:
        os.close(descriptor)


def test_a_file_that_everybody_may_read_is_read_so() -> None:
    """The question above can be answered with yes."""
    assert reading("/proc/version")[0].split()[-1].isdigit()
