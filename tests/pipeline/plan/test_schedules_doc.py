"""docs/schedules.md shows what the code prints: each Python block is run, the block below it is its output."""

import contextlib
import io
import re
from itertools import pairwise

from pipeline.plan.rules import RULES
from tests.sources import ROOT

PAGE = (ROOT / "docs" / "schedules.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    return [(match[1], match[2]) for match in BLOCK.finditer(PAGE)]


def test_every_block_is_python_or_the_output_of_the_python_above_it():
    languages = [language for language, _ in blocks()]
    assert set(languages) == {"python", "text"}
    assert languages[0] == "python"
    assert all(pair != ("text", "text") for pair in pairwise(languages))
    assert languages.count("text") >= 9


def test_every_drawing_is_what_the_code_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    printed = ""
    for language, text in blocks():
        if language == "python":
            assert printed == "", f"the page does not show this output:\n{printed}"
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(text, "docs/schedules.md", "exec"), names)
            printed = out.getvalue()
        else:
            assert printed == text
            printed = ""
    assert printed == ""
    assert (tmp_path / "artifacts" / "step.png").is_file()


def test_the_drawings_in_the_schedules_own_modules_are_their_text():
    from pipeline.plan.schedules import forward_only, gpipe, interleaved, one_f_one_b, zb_h1

    drawings = {"gpipe": gpipe, "one_f_one_b": one_f_one_b, "forward_only": forward_only, "zero_bubble": zb_h1}
    drawings["interleaved"] = lambda stages, microbatches: interleaved(4, microbatches)
    for name, schedule in drawings.items():
        source = (ROOT / "pipeline" / "plan" / "schedules" / f"{name}.py").read_text()
        drawn = [line.strip() for line in source.splitlines() if line.startswith("    worker ")]
        printed = [
            line.rpartition("│")[0].rstrip()
            for line in schedule(3, 4).text(backward=2 if schedule is zb_h1 else 1).splitlines()[1:]
        ]
        assert drawn == printed


def test_the_page_names_every_rule():
    assert re.findall(r"^\| `([a-z_]{2,})` \|", PAGE, re.MULTILINE) == list(RULES)
