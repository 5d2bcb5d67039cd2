"""The folder of a run: one program writes into it, and where there can be none a sentence says why."""

import os
from contextlib import suppress

import pytest

from pipeline import CheckpointError
from pipeline.saving import run_folder
from pipeline.saving.checkpoint import Content
from pipeline.saving.run_folder import only_writer
from pipeline.training import fit_run


def test_a_folder_that_cannot_be_is_told_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in (("file", "File exists"), ("file/below", "Not a directory")):
        with (
            pytest.raises(CheckpointError, match=f"no training can be saved.*{folder}: {why}"),
            only_writer(tmp_path / folder),
        ):
            pass
    with pytest.raises(CheckpointError, match=r"behind step 7 could not be written into .*file"):
        fit_run._written(Content({"stages": []}, {}), tmp_path / "file", 7, 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_child_that_outlives_its_program_does_not_keep_the_folder(tmp_path):
    reading, writing = os.pipe()
    with only_writer(tmp_path):
        held = max(run_folder._LOCKS)
        child = os.fork()
        if not child:
            with suppress(OSError):
                os.fstat(held)
                os.write(writing, b"held")
            os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        with os.fdopen(reading, "rb") as said:
            assert said.read() == b"", "the child has the lock's descriptor"
        with pytest.raises(CheckpointError, match="another training writes"), only_writer(tmp_path):
            pass
    with only_writer(tmp_path):
        pass
