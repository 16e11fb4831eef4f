"""Plans against what really happens: artifacts that were written, memory that was measured, models as published."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.registry import catalogue, find
from expunge.models.skeleton import skeleton
from expunge.stages import artifact
from expunge.stages._legal import FORMATS
from expunge.stages._rehearsal import Rehearsal
from expunge.stages.erase import erase
from expunge.stages.export import export
from expunge.stages.plan import plan
from stages.exports import folder

from .measured_peak import planned

TOYS = {"unet": "tiny-unet", "mmdit": "tiny-flux"}
SHORT = {"steps": 2, "walk": 2, "pool": 2, "pictures": 2, "batch": 1, "maps": 1, "pairs": 2, "refresh": 2, "draws": 1}
BLIND = {"sepme"}
"""Methods whose course depends on numbers, which a rehearsal has not: plans refuse them."""
EACH = [
    pytest.param(method, TOYS[family], id=f"{method}-{family}")
    for method in sorted(set(catalogue("methods")) - BLIND)
    for family in sorted(find("methods", method).families & set(TOYS))
]
TOLERANCE = 0.15
"""How far the measured peak may lie from the planned one: allocators round, kernels have scratch space."""


def brief(method):
    return {key: value for key, value in SHORT.items() if key in find("methods", method).__dataclass_fields__}


@pytest.mark.parametrize(("method", "model"), EACH)
def test_a_plan_says_what_is_then_written(method, model, tmp_path):
    """Names, shapes, dtypes and the size of the file to the byte, for every method on each of its families."""
    found = plan(model, method, brief(method))
    made = artifact.load(erase(planned(model, method, brief(method)), tmp_path, Run(), recorded=False))
    tensors = made.patch.tensors()
    stored = {entry.name: (entry.shape, entry.dtype) for entry in found.stored}
    real = {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()}
    assert found.kind == made.card.patch.kind and found.family == made.card.base.family
    if not found.exact:  # sizes that follow from data: names and types still hold
        assert {name: kind for name, (_, kind) in stored.items()} == {name: kind for name, (_, kind) in real.items()}
        return
    assert {name: stored[name] for name in real} == real
    if set(stored) == set(real):
        assert found.artifact == made.card.patch.bytes
        assert [site.path for site in found.sites] == sorted(made.card.patch.layers)
        assert found.share == pytest.approx(made.card.patch.share)
    else:  # what did not move is left out; a plan cannot know that
        assert method != "uce" and found.artifact > made.card.patch.bytes


@pytest.mark.parametrize("method", sorted(BLIND))
def test_what_cannot_be_rehearsed_is_said_in_one_line(method):
    with pytest.raises(InputError, match=f"method '{method}' asks for numbers that a model without weights has not"):
        plan("tiny-unet", method, brief(method))


@pytest.mark.parametrize("model", ["tiny-unet", "openclip", "sdxl", "sd3", "tiny-flux", "tiny-flux-distilled"])
def test_exports_have_the_planned_size(model, tmp_path):
    """Tensors to the byte, for every format that `export` writes of the family, and for no other."""
    base = str(folder(model, tmp_path / "base"))
    found = plan(base, "uce", {}, rank=4)
    erase(planned(base, "uce", {}), tmp_path / "run", Run(), recorded=False)
    assert [entry.format for entry in found.exports] == [
        name for name in FORMATS if name != "kohya" or found.family == "unet"
    ]
    for entry in found.exports:
        place = tmp_path / entry.format if entry.format == "pipeline" else tmp_path / f"{entry.format}.safetensors"
        place = export(tmp_path / "run", entry.format, place, rank=4 if entry.rank else None).path
        files = [place] if place.is_file() else list(place.rglob("*.safetensors"))
        real = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
        assert (entry.bytes, entry.at_most) == (real, False), entry.format
    if found.family != "unet":
        with pytest.raises(InputError, match="format 'kohya' names the layers of U-Nets"):
            export(tmp_path / "run", "kohya")


def test_no_size_for_a_layout_that_has_no_names(tmp_path):
    """The original code has one number of layers for all blocks: `export` refuses others, plans leave them out."""
    base = folder("tiny-unet", tmp_path / "base")
    assert "merged" in [entry.format for entry in plan(str(base), "uce").exports]
    config = base / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "layers_per_block": [1, 1]}))
    assert [entry.format for entry in plan(str(base), "uce").exports] == ["lora", "kohya", "comfy-diff", "pipeline"]
    erase(planned(str(base), "uce", {}), tmp_path / "run", Run(), recorded=False)
    with pytest.raises(InputError, match="has no original layout"):
        export(tmp_path / "run", "merged")


def test_a_rank_that_is_not_known_is_a_bound():
    lora = plan("tiny-unet", "uce").exports[0]
    assert lora.at_most and lora.rank == 32  # no matrix of the toy has more
    assert plan("tiny-flux", "uce").exports[0].at_most and plan("tiny-unet", "dve").exports == ()


def test_exports_of_flux_dev():
    """Two matrices that read the prompt change; T5's table of 32128 rows is in the one file twice."""
    found = {entry.format: entry for entry in plan("flux.1-dev", "uce", dtype="bfloat16", rank=4).exports}
    assert list(found) == ["lora", "comfy-diff", "merged", "pipeline"]
    assert found["lora"].bytes == 4 * 4 * (4096 + 3072 + 768 + 3072)
    assert found["comfy-diff"].bytes == 4 * 3072 * (4096 + 768)
    assert found["merged"].bytes - found["pipeline"].bytes == 2 * 32128 * 4096
    assert found["pipeline"].bytes > 2 * 11_901_408_320


@pytest.mark.parametrize(
    ("model", "count", "width", "parameters"), [("sd-1.4", 32, 768, 19_169_280), ("sdxl", 140, 2048, 340_787_200)]
)
def test_uce_on_published_unets(model, count, width, parameters):
    found = plan(model, "uce")
    assert len(found.sites) == count and {site.shape[1] for site in found.sites} == {width}
    assert Counter(site.path.split(".")[-2] for site in found.sites) == {"to_k": count // 2, "to_v": count // 2}
    assert found.parameters == parameters
    assert found.exact and found.kind == "shared"
    assert found.artifact < 0.02 * 4 * parameters  # an operator's factors instead of every layer's difference
    assert found.erasing.trainable == 0 and found.erasing.total > found.erasing.weights


@pytest.mark.parametrize(("model", "width", "pooled"), [("sd3.5-medium", 1536, 2048), ("flux.1-dev", 3072, 768)])
def test_uce_on_published_mmdits(model, width, pooled):
    found = plan(model, "uce", dtype="bfloat16")
    assert {site.path: site.shape for site in found.sites} == {
        "transformer.context_embedder.weight": (width, 4096),
        "transformer.time_text_embed.text_embedder.linear_1.weight": (width, pooled),
    }
    assert found.kind == "shared" and found.artifact < 4 * width * (4096 + pooled)  # what float32 differences take


def test_training_on_a_published_model():
    """ESD-x on SD 1.4: weights once, 80 matrices and biases as masters, Adam's two moments, and activations."""
    found = plan("sd-1.4", "esd", {"group": "cross_attention", "pool": 16})
    assert len(found.sites) == 80 and found.parameters == 43_962_560
    assert found.erasing.weights == pytest.approx(4 * 1_066_235_307, rel=1e-4)
    assert found.erasing.trainable == 4 * found.parameters
    assert found.erasing.optimizer == pytest.approx(2 * found.erasing.trainable, rel=1e-4)
    assert found.erasing.rest > 1e9
    again = plan("sd-1.4", "esd", {"group": "cross_attention", "pool": 16}, checkpointing=True)
    assert again.erasing.total < found.erasing.total - 2e9 and again.sites == found.sites


def test_erase_anything_fits_a_device_of_80_gb_at_flux_size():
    """Maps of attention for one head at a time, and none of an earlier call: otherwise hundreds of GB."""
    found = plan("flux.1-dev", "erase_anything", dtype="bfloat16", checkpointing=True)
    assert 33.7e9 < found.erasing.weights < 33.8e9 and found.erasing.total < 64e9


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is reset through Linux' /proc")
@pytest.mark.parametrize(
    ("model", "method", "more", "checkpointing"),
    [
        ("emoji-unet", "uce", {}, False),
        ("emoji-unet", "esd", {"steps": 3}, False),
        ("emoji-unet", "esd", {"steps": 3, "batch": 64, "pool": 16}, True),
        ("emoji-unet", "score", {"steps": 3}, False),
        ("emoji-flux", "erase_anything", {"steps": 3}, False),
        ("emoji-flux", "erase_anything", {"steps": 3, "batch": 64, "pool": 64}, True),
    ],
)
def test_planned_memory_is_what_an_erasure_takes(model, method, more, checkpointing, tmp_path):
    """Resident memory of a whole `erase` of its own process, over what the libraries took before.

    emoji-flux is so small that what the C library keeps of freed blocks may be as much as what is alive: there it is
    told to give every one back.
    """
    options = {key: value for key, value in brief(method).items() if key in ("steps", "walk")} | more
    script = Path(__file__).parent / "measured_peak.py"
    words = [sys.executable, str(script), model, method, json.dumps(options), str(tmp_path)]
    words += ["checkpointing"] if checkpointing else []
    told = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": "65536"} if model == "emoji-flux" else {})}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=told)
    measured = int(done.stdout.splitlines()[-1])
    assert measured == pytest.approx(plan(model, method, options, checkpointing=checkpointing).peak, rel=TOLERANCE)


def test_more_to_train_and_wider_types_take_more():
    narrow, wide = (plan("tiny-unet", "esd", {**brief("esd"), "group": group}) for group in ("cross_kv", "all"))
    assert narrow.peak < wide.peak and len(narrow.sites) < len(wide.sites)
    half = plan("tiny-unet", "uce", dtype="bfloat16")
    assert 2 * half.erasing.weights == pytest.approx(plan("tiny-unet", "uce").erasing.weights, rel=0.01)


def test_rank_of_a_low_rank_method():
    small, large = (plan("tiny-flux", "erase_anything", {**brief("erase_anything"), "rank": rank}) for rank in (2, 4))
    assert [entry.shape[0] for entry in small.stored if entry.name.endswith("lora_A.weight")] == [2] * 4
    assert len(small.sites) == len(large.sites) == 4 and small.kind == "low_rank"
    assert small.artifact < large.artifact


def test_what_cannot_be_planned():
    with pytest.raises(InputError, match="method 'mace' edits unet; model 'tiny-flux' is of family 'mmdit'"):
        plan("tiny-flux", "mace")
    with pytest.raises(InputError, match="unknown method 'usd'"):
        plan("tiny-unet", "usd")
    with pytest.raises(InputError, match="has no field 'ridg'"):
        plan("tiny-unet", "uce", {"ridg": 1})
    with pytest.raises(InputError, match="rank 0"):
        plan("tiny-unet", "uce", rank=0)


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-sdxl", "tiny-flux"])
def test_dropped_encoders_are_no_longer_counted(name: str) -> None:
    """By exactly what a model that has really given them away holds less."""
    whole, light = (plan(name, "uce", drop_encoders=dropped) for dropped in (False, True))
    model = skeleton(name)
    before, after = (Rehearsal(each.network).held for each in (model, model.without_encoders(["a cat"])))
    assert whole.erasing.weights - light.erasing.weights == before - after > 0
    assert light.erasing.rest == whole.erasing.rest and light.loading == whole.loading
