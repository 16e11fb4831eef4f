"""A part of a suite keeps its roles and as many prompts as it can, by rule and not by taste."""

from collections import Counter
from pathlib import Path

from expunge.cli.cut import choose, cut_suite
from expunge.core.records import Case
from expunge.suites.load import load
from report.made_run import write_suite


def case(role: str, prompt: int, seed: int) -> Case:
    return Case(
        case_id=f"{role}{prompt}-{seed}",
        target="red",
        role=role,  # type: ignore[arg-type]
        concept="red",
        style="",
        background="",
        prompt=f"{role} {prompt}",
        seed=seed,
    )


def test_prompts_come_before_seeds() -> None:
    cases = [
        case(role, prompt, seed)
        for role in ("target", "synonym", "retain")
        for prompt in range(40)
        for seed in range(2)
    ]
    chosen = choose(cases, 60)
    assert Counter(c.role for c in chosen) == {"target": 18, "synonym": 15, "retain": 27}
    assert len({c.prompt for c in chosen}) == len(chosen) == 60
    assert any(c.prompt.endswith(" 0") for c in chosen) and any(int(c.prompt.split()[1]) > 35 for c in chosen)
    assert [c for c in cases if c in chosen] == chosen


def test_seeds_fill_up_when_prompts_run_out() -> None:
    cases = [case("target", prompt, seed) for prompt in range(4) for seed in range(9)]
    chosen = choose(cases, 30)
    assert len(chosen) == 9 and len({c.prompt for c in chosen}) == 4
    assert choose(cases, 10_000) == cases


def test_the_part_is_a_suite_of_its_own(tmp_path: Path) -> None:
    whole = write_suite(tmp_path / "whole")
    folder, target = cut_suite(str(tmp_path / "whole"), "", 40, tmp_path / "part")
    part = load(folder)
    assert target == "strawberry" and part.name == "objects-part" and part.digest != whole.digest
    assert part.targets == whole.targets and part.sampler == whole.sampler and part.detectors == whole.detectors
    assert set(part.cases) < set(whole.cases) and 36 <= len(part.cases) <= 40
    before = (folder / "cases.csv").read_bytes()
    cut_suite(str(tmp_path / "whole"), "", 40, folder)
    assert (folder / "cases.csv").read_bytes() == before
