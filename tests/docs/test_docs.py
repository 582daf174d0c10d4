"""Paths, commands and flags named in the documentation exist; tracked files name no machine and no registry."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from motip.cli.main import app
from motip.config import reference
from motip.config.keys import Config

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PLAN = ROOT / "docs" / "from-train-md.md"
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("benchmarks", "configs", "docs", "motip", "ray_jobs", "tests")
"""A path in the text that starts with one of these is meant to be in the repository."""

MACHINE_PATH = re.compile(r"(?<![\w.)}>])/(?:work|root|home|Users|private/var)/[\w.]")
REGISTRIES = (
    "py" + "pi.",
    "python" + "hosted",
    "index" + "-url",
    "download.py" + "torch",
    "conda.ana" + "conda",
    "arti" + "factory",
)


def code_of(text: str) -> list[str]:
    """Everything in backticks, fenced or inline, one string a line."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line for block in fenced for line in block.replace("\\\n", " ").splitlines()] + inline


def commands_of(text: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in code_of(text) if "python ray_jobs/" in line or "motip" in line]


def jobs_named() -> set[str]:
    return {path for page in PAGES for path in re.findall(r"ray_jobs/\w+\.py", page.read_text())}


def verbs_named() -> set[tuple[str, ...]]:
    """The words after `motip` up to the first argument: ("weights", "inspect"), ("track",), ..."""
    groups = {group.name for group in app.registered_groups}
    found = set()
    for page in PAGES:
        for line in code_of(page.read_text()):
            match = re.match(r"motip +([a-z]\w*)(?: +([a-z]\w*))?(?: |$)", line)
            if match:
                verb, second = match.groups()
                found.add((verb, second) if verb in groups and second else (verb,))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [each for each in targets if "://" not in each and not (page.parent / each).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_named_exist(page: Path) -> None:
    words = [word for line in code_of(page.read_text()) for word in re.split(r"[\s=\[\],:;]+", line)]
    paths = [word.rstrip(".") for word in words if word.startswith(tuple(f"{folder}/" for folder in FOLDERS))]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_docs_are_found() -> None:
    assert {page.name for page in PAGES} >= {"README.md", "configuration.md", "data.md", "evaluation.md"}
    assert len(jobs_named()) >= 4
    assert len(verbs_named()) >= 6


@pytest.mark.parametrize("job", sorted(jobs_named()))
def test_jobs_named_answer_to_help(job: str) -> None:
    done = subprocess.run([sys.executable, job, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    flags = {
        word.partition("=")[0]
        for page in PAGES
        for words in commands_of(page.read_text())
        if job in words
        for word in words[words.index(job) :]
        if word.startswith("--")
    }
    assert [flag for flag in sorted(flags) if flag not in done.stdout] == []


@pytest.mark.parametrize("verb", sorted(verbs_named()), ids=" ".join)
def test_verbs_named_answer_to_help(verb: tuple[str, ...]) -> None:
    done = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    flags = {
        word.partition("=")[0]
        for page in PAGES
        for words in commands_of(page.read_text())
        if words[1 : 1 + len(verb)] == list(verb) and words[0] == "motip"
        if len(verb) == 2 or tuple(words[1:3]) not in verbs_named()  # `motip train` has options and a subcommand
        for word in words[: words.index("--") if "--" in words else None]  # behind it is another command
        if word.startswith("--")
    }
    shown = done.output.replace("-", "_")
    assert [flag for flag in sorted(flags) if flag.replace("-", "_") not in shown] == []


def test_plan_flags_are_those_of_track() -> None:
    row = next(line for line in PLAN.read_text().splitlines() if "run_video.py" in line)
    flags = re.findall(r"--\w+", row)
    shown = CliRunner().invoke(app, ["track", "--help"], env={"COLUMNS": "200"}).output.replace("-", "_")
    assert len(set(flags)) == 6
    assert [flag for flag in flags if flag.replace("-", "_") not in shown] == []


def test_flags_named_alone_belong_to_a_command() -> None:
    named = {
        flag for page in PAGES for line in code_of(page.read_text()) for flag in re.findall(r"^--[a-z][\w-]*", line)
    }
    helps = [
        subprocess.run([sys.executable, job, "--help"], capture_output=True, text=True, cwd=ROOT).stdout
        for job in sorted(jobs_named())
    ]
    helps += [CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200"}).output for verb in verbs_named()]
    known = {flag.replace("-", "_") for text in helps for flag in re.findall(r"--[a-z][\w-]*", text)}
    assert named
    assert [flag for flag in sorted(named) if flag.replace("-", "_") not in known] == []


def test_readme_has_at_most_1200_words() -> None:
    assert len(README.read_text().split()) <= 1200


def test_file_tree_has_every_package() -> None:
    block = next(
        block
        for block in re.findall(r"^```\n(.*?)^```", CONTRIBUTING.read_text(), re.DOTALL | re.MULTILINE)
        if "the package" in block
    )
    listed: list[Path] = []
    above: dict[int, Path] = {-2: ROOT}
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        for name in names:
            assert (above[indent - 2] / name).exists(), f"{name} is in the tree and not in the repository"
            listed.append(above[indent - 2] / name)
        above[indent] = listed[-1]
    motip = ROOT / "motip"
    existing = {path for path in motip.iterdir() if not path.name.startswith("__") and path.name != "py.typed"}
    assert sorted(path.name for path in existing - set(listed)) == []


def test_make_targets_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {name for page in PAGES for line in code_of(page.read_text()) for name in re.findall(r"^make (\w+)", line)}
    assert {"demo", "test"} <= named
    assert [name for name in named if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


def test_configuration_page_is_the_generated_one() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference.configuration_page(), "run python -m motip.config.reference > docs/configuration.md"


def test_every_key_stands_in_the_configuration_page_once() -> None:
    stage_keys = reference.configuration_page().split("## A stage's keys")[1].split("## The curriculum file")[0]
    rows = re.findall(r"^\| `(\w+)` \|", stage_keys, re.MULTILINE)
    assert [key for key in Config.model_fields if rows.count(key) != 1] == []
    assert "|  |\n" not in reference.configuration_page(), "a key has no meaning"


def tracked_files() -> list[Path]:
    """What is in the repository, and what the next commit would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files are tracked")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            registry = any(name in line.lower() for name in REGISTRIES)
            if registry or MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_pictures_are_small() -> None:
    pictures = [path for path in (ROOT / "docs" / "pictures").iterdir() if path.suffix in (".png", ".jpg")]
    assert pictures
    assert [path.name for path in pictures if path.stat().st_size >= 400_000] == []
