"""Every command and every Python block of the README runs, in its order, in a folder of its own that shares
the corpora with those of other pages.

So do the fenced blocks of docs/*.md that follow a line `<!-- run -->`. A `byrote` command goes through the
installed entry point; of a `make` command the target must exist. Any other command is a failure: it would go
unchecked.
"""

import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<run><!-- run -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the blocks to run."""
    found = FENCE.finditer(page.read_text("utf-8"))
    chosen = [match for match in found if page.name == "README.md" or match["run"]]
    return [(match["kind"], match["text"]) for match in chosen]


@pytest.fixture
def app() -> typer.Typer:
    [script] = entry_points(group="console_scripts", name="byrote")
    return script.load()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def place(tmp_path, corpora, monkeypatch) -> Path:
    """The parts of the repository that a command may name, and room for what it writes."""
    for name in ("recipes", "tests", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "data").symlink_to(corpora)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_everything_on_the_page_runs(page, place, app):
    for kind, text in blocks(page):
        assert kind in ("bash", "python", "text"), f"{page.name} has a block of {kind!r}: nothing would check it"
        if kind == "python":
            exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
        for line in text.splitlines() if kind == "bash" else ():
            run(line, app)


def run(line: str, app: typer.Typer) -> None:
    words = shlex.split(line, comments=True)
    if not words:
        return
    command, *arguments = words
    assert command in ("byrote", "make"), f"nothing checks {line!r}"
    if command == "make":
        assert arguments and set(arguments) <= TARGETS, f"the Makefile has no target for {line!r}"
        return
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}{result.exception!r}"
    assert result.output.strip(), f"{line} says nothing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_text_names_exists(page, app):
    """`make X` and `byrote X` in the running text, and links inside the repository."""
    text = FENCE.sub("", page.read_text("utf-8"))
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    for command, word in re.findall(r"`(make|byrote) ([\w-]+)", text):
        assert word in (TARGETS if command == "make" else verbs), f"{page.name}: `{command} {word}`"
    for path in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / path).exists(), f"{page.name} links to {path}"
    named = re.findall(r"`((?:byrote|tests|docs|recipes|examples|benchmarks)/[\w/.-]+)`", text)
    for path in named if page.name != "log.md" else ():  # which names what there was on that day
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_readme_shows_the_demo_and_the_tests():
    commands = [line for kind, text in blocks(PAGES[0]) if kind == "bash" for line in text.splitlines()]
    assert commands[:2] == ["make demo", "make test"]
    page = PAGES[0].read_text("utf-8")
    assert "| validation loss |" in page and "](docs/demo.png)" in page
