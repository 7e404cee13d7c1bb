"""Documentation that could drift from the code is generated from it or run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from docs.generate import PAGES
from expe_edge.cli.main import main as cli
from expe_edge.training.settings import make_settings
from tests.command_line import succeed

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GENERATE = (ROOT / "docs/generate.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_generated_page_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path](), "run `make docs`"


def test_the_python_example_of_the_readme_runs(packages: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "demo/package/int8-dynamic" in example
    exec(example.replace("demo/package/int8-dynamic", str(packages / "int8-dynamic")), {})  # noqa: S102
    assert capsys.readouterr().out.strip()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "example",
    re.findall(r"```python\n(.*?)```", (ROOT / "docs/runtime.md").read_text(encoding="utf-8"), flags=re.DOTALL),
)
def test_the_python_examples_of_the_runtime_run(example: str) -> None:
    exec(example, {})  # noqa: S102


@pytest.mark.parametrize("line", re.findall(r"^ {4}expe-edge (.*)$", README, flags=re.MULTILINE))
def test_the_commands_of_the_readme_parse(line: str) -> None:
    name, *arguments = shlex.split(line)
    parent = cli.make_context("expe-edge", [name])
    cli.commands[name].make_context(name, arguments, parent)


@pytest.mark.parametrize("line", re.findall(r"^ {4}expe-edge (.*)$", GENERATE, flags=re.MULTILINE))
@pytest.mark.usefixtures("elsewhere")
def test_the_commands_of_the_page_of_generate_run(line: str) -> None:
    arguments = shlex.split(re.sub(r"\$'([^']*)'", lambda text: shlex.quote(text[1].replace("\\n", "\n")), line))
    result = succeed(*arguments, stdin=b"def main():\n\n")
    assert result.stdout.strip()


def test_the_python_example_of_the_page_of_generate_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", GENERATE, flags=re.DOTALL)
    exec(example, {})  # noqa: S102
    printed = capsys.readouterr().out
    assert re.search(r'^"\d+\.\d+\.\d+"$', printed, flags=re.MULTILINE)


@pytest.mark.parametrize("target", re.findall(r"^ {4}make (\w+)", README, flags=re.MULTILINE))
def test_the_make_targets_of_the_readme_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / "examples").glob("*.yaml")), ROOT / "reference/train.yaml"], ids=lambda path: path.name
)
def test_the_example_settings_are_valid(path: Path) -> None:
    make_settings(config_file=path)


@pytest.mark.parametrize("path", re.findall(r"`([a-z_]+/[\w/.]*)`", CONTRIBUTING))
def test_what_contributors_are_sent_to_exists(path: str) -> None:
    assert (ROOT / path).exists()


def prose(page: Path) -> str:
    """A page without what it quotes between fences."""
    return re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "reference/README.md"],
    ids=lambda page: page.name,
)
def test_what_a_page_links_to_exists(page: Path) -> None:
    for link in re.findall(r"\]\(((?!http)[^)\s]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)[^)]*\)", README))

    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked
