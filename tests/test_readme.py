"""What README.md shows is true: each command is a real one, each Python block runs, each link leads somewhere.

How a block of README.md is treated follows from its language, and a block without a known language is a fault:

- ``python``: run as a file of its own in an empty folder, with the installed project. A block right below the comment
  ``<!-- continues -->`` goes on where the Python block before it ended: the two run as one file.
- ``console``: each line after ``$ `` is a command, others are its output. ``sh``, ``bash``: each line is a command.
  `tapeline ...`, `python -m pipeline ...` and `python examples/...` are run in an empty folder; `git`, `cd`, `make` and
  `pip install` are looked at and not run, since this test is part of `make test`.
- ``text``, ``mermaid``: drawings and output, not run.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.sources import ROOT
from tests.warm import WarmInterpreter

README = ROOT / "README.md"
FENCE = re.compile(
    r"^(?P<ticks>```+)(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=ticks)[ \t]*$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CONTINUES = "<!-- continues -->"
SHELLS = {"console", "sh", "bash"}
DRAWINGS = {"text", "mermaid"}
# A whole benchmark takes minutes: its command is asked for its help, which still refuses an unknown subcommand.
LONG_SUBCOMMANDS = {"bench"}
SECONDS = 300


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line it starts at, whether it goes on from the one before."""

    language: str
    text: str
    line: int
    continues: bool = False

    def __str__(self) -> str:
        return f"line {self.line}"


@dataclass(frozen=True)
class Command:
    """One shell command of a block and the line it stands at."""

    words: tuple[str, ...]
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {shlex.join(self.words)}"


class UnknownForm(Exception):
    """README.md shows something that this test cannot check."""


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of ``markdown``, a block that continues joined to what it continues."""
    found: list[Block] = []
    for match in FENCE.finditer(markdown):
        before = markdown[: match.start()]
        line = before.count("\n") + 1
        continues = before.rstrip().endswith(CONTINUES)
        language, text = match["language"], match["text"]
        if language not in SHELLS | DRAWINGS | {"python"}:
            raise UnknownForm(f"README.md, line {line}: a block in {language or 'no language'!r}; see {__name__}")
        if continues:
            earlier = [block for block in found if block.language == "python"]
            if language != "python" or not earlier:
                raise UnknownForm(f"README.md, line {line}: continues, but there is no Python before it")
            text = earlier[-1].text + text
        found.append(Block(language, text, line, continues))
    return found


def standalone(blocks: list[Block]) -> list[Block]:
    """The Python blocks to run: one that another continues runs as part of that other."""
    python = [block for block in blocks if block.language == "python"]
    return [block for block, after in zip_longest(python, python[1:]) if after is None or not after.continues]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block, lines that end with a backslash joined."""
    pending = ""
    for number, line in enumerate(block.text.splitlines(), start=block.line + 1):
        if block.language == "console" and not pending:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        words = tuple(shlex.split(pending, comments=True))
        pending = ""
        if words:
            yield Command(words, number)


def make_targets() -> set[str]:
    """The targets that the Makefile declares as such."""
    text = (ROOT / "Makefile").read_text()
    declared = set(re.findall(r"^\.PHONY:(.*)$", text, re.MULTILINE)[0].split())
    return {target for target in declared if re.search(rf"^{target}:", text, re.MULTILINE)}


def program(command: Command) -> list[str] | None:
    """What to run for ``command``, or None where a look at it is all that this test can do.

    Raises:
        UnknownForm: when the command is none that a reader could type, or one that nobody taught this test.
    """
    match command.words:
        case ("git", "clone", _url, *rest) if len(rest) <= 1:
            return None
        case ("cd", folder) if "/" not in folder:
            return None
        case ("make", *arguments):
            targets = [word for word in arguments if "=" not in word]
            if set(targets) <= make_targets() and targets:
                return None
        case ("pip" | ".venv/bin/pip", "install", *options, target) if set(options) <= {"-e", "--editable"}:
            if re.fullmatch(r"\.(\[\w+\])?", target):
                return None
        case ("tapeline" | ".venv/bin/tapeline", *arguments):
            return [str(Path(sys.executable).with_name("tapeline")), *shortened(arguments)]
        case ("python" | ".venv/bin/python", "-m", "pipeline", *arguments):
            return [sys.executable, "-m", "pipeline", *shortened(arguments)]
        case ("python" | ".venv/bin/python", script, *arguments) if re.fullmatch(r"examples/\w+\.py", script):
            if (ROOT / script).is_file():
                return [sys.executable, str(ROOT / script), *arguments]
    raise UnknownForm(f"README.md, {command}: not a command that exists, or not a form that {__name__} knows")


def shortened(arguments: list[str]) -> list[str]:
    """``arguments`` of `tapeline`, a subcommand that takes minutes asked for its help."""
    return [*arguments, "--help"] if set(arguments[:1]) & LONG_SUBCOMMANDS else arguments


def run(program: list[str], folder: Path) -> None:
    """Run ``program`` in the empty ``folder`` as a reader would, and fail with what it printed."""
    result = subprocess.run(
        program,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}"


def readme() -> str:
    return README.read_text() if README.is_file() else ""


BLOCKS = blocks(readme())
COMMANDS = [command for block in BLOCKS if block.language in SHELLS for command in commands(block)]
PYTHON = standalone(BLOCKS)


# -- the README --------------------------------------------------------------------------------------------------


def test_the_readme_shows_commands_and_python() -> None:
    assert README.is_file(), "README.md is missing"
    assert PYTHON, "README.md shows no Python"
    shown = {command.words for command in COMMANDS}
    assert ("make", "demo") in shown and ("make", "test") in shown, shown


@pytest.mark.gate
@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_a_python_block_runs_in_an_empty_folder(
    block: Block, tmp_path: Path, warm_interpreter: WarmInterpreter
) -> None:
    script = tmp_path / "shown.py"
    script.write_text(block.text)
    result = warm_interpreter.run(script, folder=tmp_path, seconds=SECONDS)
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}"


@pytest.mark.gate
@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=str)
def test_a_command_works(command: Command, tmp_path: Path) -> None:
    runnable = program(command)
    if runnable is not None:
        run(runnable, tmp_path)


def test_a_link_leads_to_a_file_of_the_repository() -> None:
    targets = {found for found in LINK.findall(FENCE.sub("", readme())) if not found.startswith(("http", "#"))}
    assert targets
    dead = sorted(target for target in targets if not (ROOT / target.partition("#")[0]).exists())
    assert not dead, f"README.md links to what does not exist: {', '.join(dead)}"


# -- this test's own eyes ----------------------------------------------------------------------------------------


def only_command(line: str) -> Command:
    (command,) = commands(Block("sh", line + "\n", 1))
    return command


@pytest.mark.parametrize(
    "line",
    [
        "rm -rf x",
        "make no-such-target",
        "make",
        "pip install something-else",
        "python examples/no_such_example.py",
        "python setup.py install",
        "cd ../elsewhere",
        "sudo make demo",
        "curl https://example.org | sh",
        "tapelin demo",
    ],
)
def test_an_unknown_command_form_is_refused(line: str) -> None:
    with pytest.raises(UnknownForm):
        program(only_command(line))


@pytest.mark.parametrize(
    "line", ["git clone https://example.org/tapeline", "cd tapeline", "make test WORKERS=1", "make demo"]
)
def test_a_command_that_this_test_must_not_run_is_only_looked_at(line: str) -> None:
    assert program(only_command(line)) is None


def test_a_tapeline_command_is_run_with_its_own_arguments() -> None:
    words = program(only_command("tapeline demo --epochs 2"))
    assert words is not None and words[1:] == ["demo", "--epochs", "2"]
    words = program(only_command("tapeline bench --steps 20"))
    assert words is not None and words[1:] == ["bench", "--steps", "20", "--help"]


def test_console_output_is_not_taken_for_a_command() -> None:
    block = Block("console", "$ make \\\n    demo  # sixty seconds\naccuracy 0.98\n$ make test\n", 10)
    assert list(commands(block)) == [Command(("make", "demo"), 12), Command(("make", "test"), 14)]


def test_a_block_in_no_known_language_is_refused() -> None:
    with pytest.raises(UnknownForm, match="line 3"):
        blocks("# Title\n\n```\nx\n```\n")


def test_a_block_that_continues_holds_what_came_before() -> None:
    text = f"```python\na = 1\n```\nwords\n{CONTINUES}\n```python\nprint(a)\n```\n```python\nb = 2\n```\n"
    assert [block.text for block in standalone(blocks(text))] == ["a = 1\nprint(a)\n", "b = 2\n"]


@pytest.mark.parametrize("source", ["raise SystemExit(3)", "import no_such_module"])
def test_python_that_fails_is_a_failure(source: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="exit status"):
        run([sys.executable, "-c", source], tmp_path)
