"""What README and examples show is run, and what the documents name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_the_readme_runs_and_erases(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 10
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    python("example.py", cwd=tmp_path)
    before, after = (tmp_path / f"{name}.png" for name in ("before", "after"))
    assert before.stat().st_size > 1000 and before.read_bytes() != after.read_bytes()


def test_examples_are_short() -> None:
    examples = list((ROOT / "examples").glob("*.py"))
    assert len(examples) >= 4
    assert all(len(file.read_text().splitlines()) < 40 for file in examples)


def test_one_concept_two_methods(tmp_path: Path) -> None:
    python(ROOT / "examples" / "erase_and_compare.py", "tiny-unet", tmp_path, cwd=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.png", "esd.png", "uce.png"]
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 3


def test_patches_stack(tmp_path: Path) -> None:
    changes = re.findall(
        r"pixel ([\d.]+) of", python(ROOT / "examples" / "stack_patches.py", "tiny-unet", cwd=tmp_path)
    )
    assert len(changes) == 3 and all(float(change) > 0 for change in changes[:2])


def test_a_method_of_your_own_keeps_the_contract(tmp_path: Path) -> None:
    assert python(ROOT / "examples" / "check_own_method.py", cwd=tmp_path).count("kept:") > 5


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/index.md",
        "docs/methods.md",
        "docs/effects.md",
        "docs/limits.md",
        "docs/certificate.md",
        "docs/design.md",
        "docs/export.md",
        "docs/plan.md",
    ],
)
def test_documents_promise_no_bound_and_show_no_loose_number(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"leakage\s*(≤|<=)", text) and not re.search(r"\[(recall|memory)\]", text)


def test_local_links_lead_somewhere() -> None:
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", file.read_text(encoding="utf-8")):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


@pytest.mark.parametrize(
    "verb", ["demo", "plan", "erase", "compose", "undo", "export", "generate", "score", "certify", "report", "list"]
)
def test_every_command_is_documented(verb: str) -> None:
    assert (
        f"expunge {verb}"
        in README + (ROOT / "docs" / "index.md").read_text() + (ROOT / "docs" / "design.md").read_text()
    )


def test_shown_command_lines_parse() -> None:
    """Commands in the documents use options that exist."""
    for line in re.findall(r"^expunge (?!list)(\w+)(.*)$", README, re.MULTILINE):
        verb, rest = line
        shown = subprocess.run(
            [sys.executable, "-m", "expunge.cli", verb, "--help"], capture_output=True, text=True
        ).stdout
        for option in re.findall(r"(?<=\s)--?[a-z]+", rest):
            assert option in shown, f"expunge {verb} has no {option}"
