"""Erase one thing today, another tomorrow, take the first back next week: as a person types it, on the toy model."""

import json
from pathlib import Path

import pytest
import torch

from expunge.core.card import Card
from expunge.models.load import load
from expunge.models.tiny import tiny_pipeline
from expunge.stages import artifact

UCE = ("--method", "uce", "--set", "mode=uce2025", "--set", "ridge=0.5")


@pytest.fixture
def made(tmp_path: Path, expunge):
    """Erase words from the toy, each into a folder of its own name."""

    def erase(folder: str, *targets: str, more: tuple[str, ...] = (), method: tuple[str, ...] = UCE) -> Path:
        words = [word for target in targets for word in ("--target", target)]
        done = expunge("erase", "tiny-unet", *words, *method, *more, "--out", tmp_path / folder)
        assert done.code == 0, done.err
        return tmp_path / folder

    return erase


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = load("tiny-unet")
    view = artifact.load(folder).on(model)
    return {site.path: site.weight for site in view.sites("text_in")}


def far(one: Path, two: Path) -> float:
    """Largest difference of two artifacts' weights, relative to what the first changed."""
    a, b, old = weights(one), weights(two), {site.path: site.weight for site in load("tiny-unet").sites("text_in")}
    return max(float((a[path] - b[path]).norm() / (a[path] - old[path]).norm()) for path in a)


def test_compose_is_the_joint_solve_and_undo_takes_it_back(tmp_path: Path, made, expunge) -> None:
    a, b, joint = made("a", "cat"), made("b", "dog"), made("joint", "cat", "dog")
    done = expunge("compose", a, b, "--out", tmp_path / "ab", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["order"] == [{"targets": ["cat", "dog"], "joint": True, "bound": False, "commutator": None}]
    card = Card.from_json((tmp_path / "ab" / "artifact" / "card.json").read_text())
    assert [c.name for c in card.target] == ["cat", "dog"] and card.method == "uce" and card.config["ridge"] == 0.5
    assert {"residual", "drift"} <= {each["name"] for each in told["card"]["certificates"]}
    assert far(tmp_path / "ab", joint) < 1e-4  # float32 weights, and prompts encoded in other batches
    assert card.patch.bytes < 20_000
    assert expunge("undo", tmp_path / "ab", "--target", "Cat", "--out", tmp_path / "b2").code == 0
    assert far(tmp_path / "b2", b) == 0
    again = Card.from_json((tmp_path / "b2" / "artifact" / "card.json").read_text())
    assert [c.name for c in again.target] == ["dog"]
    assert expunge("compose", a, b, "--out", tmp_path / "ab").code == 0  # a finished one is kept
    assert "other parts" in expunge("compose", b, a, "--out", tmp_path / "ab").complaint()
    words = ("--prompt", "cat", "-n", 1, "--steps", 2, "--out", tmp_path / "images")
    assert expunge("generate", tmp_path / "ab", *words).code == 0


def test_erasing_on_an_artifact_holds_both(tmp_path: Path, made, expunge) -> None:
    a, b = made("a", "cat", more=("--retain", "dog")), made("b", "dog")
    words = ("erase", "--target", "dog", *UCE, "--on", a, "--out", tmp_path / "ab")
    done = expunge(*words, "--json")
    assert done.code == 0, done.err
    card = json.loads(done.out)["card"]
    assert [c["name"] for c in card["target"]] == ["cat", "dog"] and card["retain"] == []
    assert far(tmp_path / "ab", b) > 1e-3
    assert expunge("undo", tmp_path / "ab", "--target", "cat", "--out", tmp_path / "left").code == 0
    assert far(tmp_path / "left", b) == 0
    assert expunge(*words, "--json").out == done.out  # the same command again keeps what is there
    assert "another recipe" in expunge(*words, "--set", "strength=2").complaint()
    recipe = tmp_path / "ab" / "recipe.toml"
    assert expunge("erase", "--recipe", recipe, "--out", tmp_path / "again").code == 0
    assert far(tmp_path / "again", tmp_path / "ab") == 0


def test_what_was_computed_from_weights_stays_where_it_was_made(tmp_path: Path, made, expunge) -> None:
    rece = ("--method", "rece", "--set", "epochs=1", "--set", "ridge=0.5")
    a, r = made("a", "cat"), made("r", "dog", method=rece)
    assert "computed from weights" in expunge("compose", a, r, "--out", tmp_path / "ar").complaint()
    assert expunge("compose", r, a, "--out", tmp_path / "ra").code == 0
    assert expunge("erase", "--target", "dog", *rece, "--on", a, "--out", tmp_path / "on").code == 0
    complaint = expunge("undo", tmp_path / "on", "--target", "cat", "--out", tmp_path / "x").complaint()
    assert "dog was computed from the weights that erasing cat left" in complaint
    assert expunge("undo", tmp_path / "on", "--target", "dog", "--out", tmp_path / "y").code == 0
    assert far(tmp_path / "y", a) == 0
    card = Card.from_json((tmp_path / "on" / "artifact" / "card.json").read_text())
    assert card.method == "uce+rece" and "ridge" in card.config and "epochs" not in card.config


def test_trce_multiplies_and_leaves_again(tmp_path: Path, made, expunge) -> None:
    a, t = made("a", "cat"), made("t", "dog", method=("--method", "trce"))
    assert expunge("erase", "--target", "dog", "--method", "trce", "--on", a, "--out", tmp_path / "on").code == 0
    assert far(tmp_path / "on", t) > 1e-3
    assert expunge("undo", tmp_path / "on", "--target", "cat", "--out", tmp_path / "left").code == 0
    assert far(tmp_path / "left", t) == 0
    card = Card.from_json((tmp_path / "on" / "artifact" / "card.json").read_text())
    assert card.method == "uce+trce" and [c.name for c in card.target] == ["cat", "dog"]


BAD = {
    "unknown target": (("undo", "a", "--target", "dgo"), "dgo", "cat"),
    "nothing left": (("undo", "a", "--target", "cat"), "nothing but cat", "tiny-unet"),
    "one operator": (("undo", "many", "--target", "cat"), "one operator", "dog"),
    "erased twice": (("compose", "a", "a"), "cat", "twice"),
    "anchor erased": (("compose", "a", "to"), "anchor", "cat"),
    "no artifact": (("compose", "a", "nowhere"), "nowhere", "artifact"),
    "full differences": (("compose", "a", "tensor"), "does not compose", "tensor"),
    "other layers": (("compose", "a", "--base", "tiny-sdxl"), "tiny-sdxl", "text encoder"),
    "trained": (("erase", "--target", "car", "--method", "esd", "--on", "a"), "esd", "legal"),
    "erased twice on": (("erase", "--target", "cat", *UCE, "--on", "a"), "cat", "twice"),
}


def test_what_cannot_be_is_one_line(tmp_path: Path, made, expunge) -> None:
    made("a", "cat")
    made("to", "dog", more=("--anchor", "cat"))
    made("many", "cat", "dog", "car", "banana", "guitar", "red", method=("--method", "uce"))
    made("tensor", "dog", method=("--method", "uce", "--set", "technique=tensor"))
    folders = {path.name: path for path in tmp_path.iterdir()} | {"nowhere": tmp_path / "nowhere"}
    for name, (words, names, also) in BAD.items():
        asked = [folders.get(word, word) for word in words]
        complaint = expunge(*asked, "--out", tmp_path / "out").complaint()
        assert names in complaint and also in complaint, (name, complaint)
        assert not (tmp_path / "out").exists(), name


def test_an_artifact_moves_to_a_model_with_the_same_text_encoder(tmp_path: Path, made, expunge) -> None:
    a, other = made("a", "cat"), tiny_pipeline("tiny-unet", seed=5)
    other.save_pretrained(tmp_path / "foreign")
    other.text_encoder = tiny_pipeline("tiny-unet").text_encoder
    other.save_pretrained(tmp_path / "other")
    done = expunge("compose", a, "--base", tmp_path / "other", "--out", tmp_path / "moved", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["card"]["base"]["name"] == str(tmp_path / "other")
    words = ("--prompt", "cat", "-n", 1, "--steps", 2, "--out", tmp_path / "images")
    assert expunge("generate", tmp_path / "moved", *words).code == 0
    complaint = expunge("compose", a, "--base", tmp_path / "foreign", "--out", tmp_path / "x").complaint()
    assert "differs in its text encoder" in complaint
