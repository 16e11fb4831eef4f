"""What a later run adds its targets and methods to comes back as it was measured."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks import effect, effect_record

from expunge.suites.load import load

SUITE = load("objects")


def decisions(target: str, arm: str, detector: str) -> list[dict[str, Any]]:
    """One row for every case and one about the style of every neighbour; every third fires."""
    found = []
    for role in effect_record.ROLES:
        for i, case in enumerate(effect_record.asked(SUITE, target, role)):
            about = {"arm": arm, "detector": detector, "role": role, "target": target}
            found.append({**about, "case_id": case.case_id, "prompt": case.prompt, "fired": i % 3 == 0})
    return found


def recorded(*targets: str) -> tuple[effect_record.Record, list[dict[str, Any]]]:
    record: effect_record.Record = {}
    whole = []
    for target in targets:
        for arm in ("base", "uce"):
            rows = [row for judge in SUITE.detectors for row in decisions(target, arm, judge)]
            packed = effect_record.packed(rows, SUITE, target)[arm]
            effect_record.add(record, target, arm, {"set": [], "seconds": 0.1, **packed})
            whole += rows
    return record, whole


def test_rows_come_back_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effect_record, "HOME", tmp_path)
    record, whole = recorded("pizza", "dog")
    effect_record.write(record, "emoji-unet", "objects")
    again = effect_record.read("emoji-unet", "objects")
    assert again == record and list(again) == ["pizza", "dog"]
    keys = ("arm", "detector", "role", "target", "prompt", "fired")

    def comparable(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return sorted(tuple(row[key] for key in keys) for row in rows)

    assert comparable(effect_record.unpacked(again, SUITE)) == comparable(whole)
    assert comparable(whole[1:]) != comparable(whole)


def test_an_arm_is_held_against_the_base_on_its_own_targets() -> None:
    record, _ = recorded("pizza", "dog")
    del record["dog"]["uce"]
    for marks in (record["dog"]["base"][judge] for judge in SUITE.detectors):
        marks["retain"] = "0" * len(marks["retain"])
    found = effect_record.unpacked(record, SUITE)
    assert {row["target"] for row in effect.facing(found, "uce")} == {"pizza"}
    kept = effect.plain(found)["judge_cnn"]
    assert kept["uce"]["verdict"]["retained_of_base"] == 1
    assert kept["base"]["retain_rate"]["value"] == kept["uce"]["retain_rate"]["value"] / 2


def test_a_refusal_is_on_record_and_counts_for_no_rate() -> None:
    record, whole = recorded("pizza", "dog")
    record["dog"]["uce"] = {"set": [], "refused": "lies within what is held"}
    found = effect_record.unpacked(record, SUITE)
    assert {row["target"] for row in found if row["arm"] == "uce"} == {"pizza"} and len(found) < len(whole)
    table = effect.markdown("objects", record)
    assert effect_record.drawn(record) == ["base, uce on pizza, dog"]
    assert "| uce, cnn | 1, refused: dog |" in table and "| base, cnn | 2 |" in table


def test_other_settings_and_other_cases_are_refused() -> None:
    record, whole = recorded("pizza")
    with pytest.raises(SystemExit, match="on record with"):
        effect_record.add(record, "dog", "uce", {**record["pizza"]["uce"], "set": ["uce.ridge=1"]})
    stray = {**whole[0], "case_id": "no-such-case"}
    with pytest.raises(SystemExit, match="not those of suite objects"):
        effect_record.packed([*whole, stray], SUITE, "pizza")


def test_what_was_written_before_decisions_were_kept_stays_until_all_of_it_is_run_again() -> None:
    old = {
        "targets": ["pizza"],
        "set": [],
        "torch": "2",
        "seconds": {},
        "rates": {"judge_cnn": {"base": {}, "esd": {}}},
    }
    held = effect.earlier({**old, "machine": "x"}, ["base", "uce"])
    assert held == old and effect.earlier({"targets": {}, "rates": {}, "earlier": held}, ["base", "uce"]) == old
    assert effect.earlier({"earlier": held}, ["base", "esd"]) == {}
    assert effect.earlier({"targets": {"uce": ["pizza"]}, "rates": {"judge_cnn": {"esd": {}}}}, ["base"]) == {}
    assert effect.earlier({}, []) == {}
