"""`expunge plan` as it is typed."""

import json

import pytest


def test_people_and_machines_get_the_same_plan(expunge) -> None:
    people = expunge("plan", "sd-1.4", "--method", "uce")
    assert people.code == 0, people.err
    assert "32 tensors, 19,169,280 numbers" in people.out
    row = next(line for line in people.out.splitlines() if "down_blocks.*" in line and "320 × 768" in line)
    assert "attn2.to_k.weight" in row and row.split()[-1] == "2"
    assert "76.68 MB" in people.out and "weights" in people.out
    data = json.loads(expunge("plan", "sd-1.4", "--method", "uce", "--json").out)
    assert len(data["sites"]) == 32 and data["parameters"] == 19_169_280
    assert data["peak"] >= sum(data["erasing"].values()) > data["erasing"]["weights"] > 4e9


def test_every_tensor_by_name(expunge) -> None:
    out = expunge("plan", "tiny-unet", "--method", "uce", "--names").out
    assert out.count("attn2.to_k.weight") == 4
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight" in out


def test_a_guard_changes_nothing(expunge) -> None:
    out = expunge("plan", "tiny-unet", "--method", "dve").out
    assert "changes no tensor; the guard stores 6" in out


def test_settings_and_rank(expunge) -> None:
    words = ("plan", "tiny-unet", "--method", "uce", "--rank", 3, "--set", "ridge=5", "--json")
    data = json.loads(expunge(*words).out)
    assert data["config"]["ridge"] == 5.0
    assert [entry["rank"] for entry in data["exports"]] == [3, 3, None, None, None]


BAD = {
    "model": (("sd-9", "--method", "uce"), "'sd-9'", "flux.1-dev"),
    "method": (("sd-1.4", "--method", "usd"), "'usd'", "uce"),
    "family": (("tiny-flux", "--method", "mace"), "mace", "mmdit"),
    "field": (("tiny-unet", "--method", "uce", "--set", "ridg=1"), "ridg", "ridge"),
    "rank": (("tiny-unet", "--method", "uce", "--rank", 0), "rank 0", "1 or more"),
    "dtype": (("tiny-unet", "--method", "uce", "--dtype", "int4"), "int4", "float32"),
}


@pytest.mark.parametrize("words, names, also", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(words: tuple[str, ...], names: str, also: str, expunge) -> None:
    complaint = expunge("plan", *words).complaint()
    assert names in complaint and also in complaint, complaint
