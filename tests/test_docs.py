"""README.md and docs/: their commands are those that there are, their map is the package, their snippet runs.

All of the commands are run, small, in test_pages.py and test_continue.py, which are slow; here, at once, they are
looked at. Job files are in test_running.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from esm2_composer.model import ESM2, ESM2Config
from esm2_composer.recipe.config import load_recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


IN_BLOCKS = "python|composer"  # within text they are mentioned rather than told
ANYWHERE = "make|pytest|tensorboard|pkill|sbatch|kubectl|sed|cut|awk|zcat|apt|pip|source|hf|download_bionemo_data"
COMMAND = re.compile(rf"(\S+=\S+ )*({IN_BLOCKS}|{ANYWHERE}) ")
CODE = re.compile(r"```(?P<language>\w*)\n(?P<block>[^`]*)```|^ {4}(?P<line>.*)$|`(?P<text>[^`]+)`", re.MULTILINE)


def shell(page: Path) -> list[str]:
    """The lines of a page's blocks of shell, continued ones joined, comments dropped."""
    blocks = [code["block"] for code in CODE.finditer(page.read_text()) if code["language"] == "sh"]
    return [line for block in blocks for line in lines_of(block)]


def lines_of(block: str) -> list[str]:
    lines = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in lines if line]


def commands(page: Path) -> list[str]:
    """What a page tells to type, in its order and once each: in its blocks, and within its text."""
    found: dict[str, None] = {}
    for code in CODE.finditer(page.read_text()):
        if code["text"]:
            line = " ".join(code["text"].split())
            found |= {line: None} if re.match(f"({ANYWHERE}) ", line) else {}
        elif code["language"] in ("sh", None):
            found |= {line: None for line in lines_of(code["block"] or code["line"]) if COMMAND.match(line)}
    return list(found)


COMMANDS = sorted(
    {line for page in PAGES for line in commands(page) if re.match(rf"(\S+=\S+ )*({IN_BLOCKS}) ", line)}
)


@functools.cache
def help_of(script: str, *subcommand: str) -> str:
    main = importlib.import_module(Path(script).stem).main
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as told:
        patch.setattr(sys, "argv", [script, *subcommand, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            main()
    return told.getvalue()


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 20
    assert {Path(word).name for command in COMMANDS for word in command.split() if word.endswith(".py")} >= {
        *("train.py", "convert.py", "evaluate.py", "export_hf.py", "embed.py", "benchmark.py", "plan.py")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_line_of_shell_is_taken_for_a_command_or_sets_variables(page: Path) -> None:
    others = [line for line in shell(page) if not COMMAND.match(line)]
    assert all(re.fullmatch(r"(\w+=\S+ ?)+", line) for line in others), others


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_a_script_and_options_that_there_are(command: str) -> None:
    words = shlex.split(re.sub(r"[\[\]…]", "", command).replace("$", ""))
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, rest = words[at], words[at + 1 :]
    assert (ROOT / script).is_file()
    if script == "train.py":
        recipe, *rest = rest
        overrides = [word for word in rest if re.match(r"[a-z_.]+=", word) and not re.search("=[A-Z{]", word)]
        load_recipe(str(ROOT / recipe), overrides, data_is_here=False)
        rest = [word for word in rest if word.startswith("--")]
    subcommand = rest[:1] if script.endswith("benchmark.py") else []
    known = help_of(script, *subcommand)
    for option in [word for word in rest if word.startswith("--")]:
        assert re.search(rf"{option}\b(?!-)", known), f"{script} has no {option}"


def test_the_map_names_every_file_once() -> None:
    text = (ROOT / "README.md").read_text()
    block = text[text.index("    esm2_composer/\n") : text.index("    tools/ ")]
    package = ROOT / "esm2_composer"
    named: list[Path] = []
    folder = package
    for indent, name in re.findall(r"^ {6}( *)(\w+(?:\.py |/\n))", block, re.MULTILINE):
        folder = folder if indent else package
        if name.endswith("/\n"):
            folder = package / name.strip()
        else:
            named.append(folder / name.strip())
    assert len(named) == len(set(named))
    assert set(named) == {path for path in package.rglob("*.py") if path.name != "__init__.py"}
    tools = re.search(r"^ {4}tools/ +((?:.+\n)+?) {4}tests/", text, re.MULTILINE)[1]
    assert set(re.findall(r"\w+", tools)) == {path.stem for path in (ROOT / "tools").glob("*.py")}


def test_tests_that_are_named_are_there() -> None:
    there = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    for page in PAGES:
        for name in re.findall(r"`(?:\.\.\.)?(\w*test_\w+?)(?:\.\.\.)?`", page.read_text()):
            assert any(f"def {name}" in text for text in there.values()), f"{page.name}: {name}"
        for name in re.findall(r"\btest_\w+\.py", page.read_text()):
            assert name in there, f"{page.name}: {name}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target, anchor in re.findall(r"\]\((?!https://)([^)#]*)#?([^)]*)\)", page.read_text()):
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in headings(there), f"{page.name}: {target}#{anchor}"


def headings(page: Path) -> set[str]:
    """As a link names them: small letters, hyphens for spaces, no other signs."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


def test_the_snippet_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ESM2(ESM2Config(2, 32, 4, 64)).save_hf("my_esm2")
    names: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(snippet, names)  # our own page
    assert names["logits"].shape == (10 + 9 + 4, 33)
