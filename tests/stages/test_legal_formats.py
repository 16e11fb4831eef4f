"""What an export is told to be legal is: every kind of patch and family, every format."""

import re
from pathlib import Path

import pytest
import torch

from expunge.core.errors import InputError
from expunge.core.patch import Patch
from expunge.models.load import load
from expunge.patches.guard import GuardPatch, PassGuard
from expunge.patches.lowrank import LowRankPatch
from expunge.stages import artifact
from expunge.stages._legal import FORMATS, legal
from expunge.stages.export import export
from stages.exports import change, cross, joint, made
from stages.test_artifact import Nudge

MODELS = ("tiny-unet", "tiny-flux", "tiny-sd3")
KINDS = ("weights", "lowrank", "guard")


def patch(kind: str, name: str) -> Patch:
    """A patch of each kind that changes something the model has."""
    if kind == "guard":
        return GuardPatch(PassGuard(), {"centre": torch.ones(3)})
    full = change(load(name), cross if name == "tiny-unet" else joint)
    if kind == "weights":
        return full
    return LowRankPatch(
        {path: (torch.ones(1, delta.shape[1]), torch.ones(delta.shape[0], 1)) for path, delta in full.deltas.items()}
    )


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards are rebuilt by their method, which here is a test's own."""
    monkeypatch.setattr(artifact, "find", lambda package, name: Nudge)


@pytest.mark.usefixtures("told")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_legal_is_written_and_what_is_not_names_what_is(name: str, kind: str, tmp_path: Path) -> None:
    source, _ = made(tmp_path, name, patch(kind, name))
    allowed = legal(artifact.read_card(source))
    assert ("kohya" in allowed) == (name == "tiny-unet") and ("merged" in allowed) == (kind != "guard")
    for to in FORMATS:
        if to not in allowed:
            with pytest.raises(InputError) as caught:
                export(source, to)
            assert re.search(r"legal: ([^(]*)", str(caught.value))[1].strip().split(", ") == list(allowed)
        elif not (name == "tiny-sd3" and to == "merged"):  # this toy's first CLIP has a projection: a test of its own
            folder = kind == "guard" or to == "pipeline"
            done = export(source, to, tmp_path / (to if folder else f"{to}.safetensors"))
            assert done.format == ("guard" if kind == "guard" else to)


@pytest.mark.usefixtures("told")
def test_a_guard_has_no_rank(tmp_path: Path) -> None:
    source, _ = made(tmp_path, "tiny-flux", patch("guard", "tiny-flux"))
    with pytest.raises(InputError, match="guard, whose tensors are written as they are, got rank 4; give none"):
        export(source, "lora", rank=4)
    assert not (source / "export").exists()


def test_a_rank_is_sent_to_formats_of_the_family(tmp_path: Path) -> None:
    source, _ = made(tmp_path, "tiny-flux", patch("weights", "tiny-flux"))
    with pytest.raises(InputError, match=r"has no rank, got 4; legal with a rank: lora$"):
        export(source, "comfy-diff", rank=4)
