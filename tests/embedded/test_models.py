"""The embedded models are stock: diffusers and transformers open them with none of our code."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from safetensors import safe_open
from training import calibrate, loop, release, world
from training.autoencoder import reconstruct
from transformers import CLIPTokenizer

from expunge.core.concept import Concept
from expunge.core.errors import InputError
from expunge.core.registry import find
from expunge.models._names import embedded_names
from expunge.models.load import load

EMBEDDED = Path(__file__).parents[2] / "src" / "expunge" / "embedded"
PROMPTS = ["a flat picture of a strawberry on a blue background", "a ink picture of a car on a pink background"]
JUDGES = ("judge_cnn", "judge_vit")


MODELS = ("emoji-flux", "emoji-flux-distilled", "emoji-unet")


def stock(name: str, seeds: Sequence[int]) -> np.ndarray:
    """What the stock pipeline draws at scale 4 in 5 steps; FLUX' two kinds take scale and sizes in their own ways."""
    pipeline = DiffusionPipeline.from_pretrained(EMBEDDED / name, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    asked = {"generator": [torch.Generator().manual_seed(seed) for seed in seeds], "output_type": "np"}
    if isinstance(pipeline, FluxPipeline):
        asked |= {"height": 64, "width": 64, "max_sequence_length": pipeline.tokenizer_2.model_max_length}
    if name == "emoji-flux":
        asked |= {"true_cfg_scale": 4.0, "negative_prompt": ["", ""]}
    else:
        asked["guidance_scale"] = 4.0
    return pipeline(PROMPTS, num_inference_steps=5, **asked).images


def test_these_models_ship():
    assert embedded_names() == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_the_stock_pipeline_draws_what_we_draw(name):
    model, theirs = load(name), stock(name, [3, 4])
    ours = model.generate(PROMPTS, seeds=[3, 4], guidance_scale=4.0, steps=5)
    assert np.abs(theirs - ours.permute(0, 2, 3, 1).numpy()).max() < 1e-5
    other = model.generate(PROMPTS, seeds=[5, 6], guidance_scale=4.0, steps=5)
    assert np.abs(theirs - other.permute(0, 2, 3, 1).numpy()).max() > 0.05


def test_the_two_of_flux_are_one_model_but_for_the_scale():
    """Everything but the transformer is the same, and that has one part more: the embedder of the scale."""
    plain, distilled = (EMBEDDED / name for name in MODELS[:2])
    for part in ("text_encoder", "text_encoder_2", "vae"):
        file = next((plain / part).glob("*.safetensors")).relative_to(plain)
        assert (plain / file).read_bytes() == (distilled / file).read_bytes()
    weights = "transformer/diffusion_pytorch_model.safetensors"
    with safe_open(plain / weights, "pt") as one, safe_open(distilled / weights, "pt") as two:
        more = set(two.keys()) - set(one.keys())
        assert more
        assert all(key.startswith("time_text_embed.guidance_embedder.") for key in more)
        assert set(one.keys()) < set(two.keys())


@pytest.mark.parametrize("flow", [True, False], ids=["flow", "the rest"])
def test_weights_are_small_and_half_precision(flow):
    files = [
        f for f in EMBEDDED.rglob("*.safetensors") if f.relative_to(EMBEDDED).parts[0].startswith("emoji-flux") is flow
    ]
    assert len(files) >= 6
    assert sum(file.stat().st_size for file in files) <= 60e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, file


@pytest.mark.parametrize("name", MODELS)
def test_the_model_names_its_licence_and_the_hands_that_drew(name):
    card = (EMBEDDED / name / "README.md").read_text()
    assert "license: apache-2.0" in card
    for hand in ("Twemoji", "EmojiOne", "Fluent", "Noto"):
        assert hand in card


@pytest.mark.parametrize("name", MODELS)
def test_what_the_card_shows_draws_what_we_draw(name, tmp_path, monkeypatch):
    """The card is the one that `training` writes, and its snippet, run as it stands, gives our picture."""
    text = (EMBEDDED / name / "README.md").read_text()
    command, (code,) = re.findall("made by `(.*?)`", text)[0], re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert text == release.card(DiffusionPipeline.from_pretrained(EMBEDDED / name), name, command)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name, "exec"), {})
    theirs = np.asarray(Image.open("strawberry.png"), dtype=np.float32) / 255
    ours = load(name).generate([PROMPTS[0]], seeds=[0], guidance_scale=4.0, steps=25)[0].permute(1, 2, 0).numpy()
    assert ours.std() > 0.05 and np.abs(theirs - ours).max() <= 1 / 255


def test_the_tokenizer_spells_anything():
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "emoji-unet" / "tokenizer", local_files_only=True)
    assert len(tokenizer) >= 2000
    for text in ("Zürich 🍓", "蛇", "\x07bell", "qzxj-77"):
        ids = tokenizer(text).input_ids[1:-1]
        assert ids
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_knows_real_renders_under_augmentations_it_never_saw(name):
    judge, data = find("detectors", name)(), world.load()
    index = torch.arange(0, len(data.rgba), 3)
    background = index % len(world.BACKGROUNDS)
    images = calibrate.unseen(data.compose(index, background), torch.Generator().manual_seed(1))
    logits = judge.logits(images)
    truth = {"concept": data.concept[index], "style": data.style[index], "background": background}
    for head, right in truth.items():
        assert (logits[head].argmax(1) == right).float().mean() >= 0.97


@pytest.mark.parametrize("name", JUDGES)
def test_calibration_agrees_with_what_the_weights_do_now(name):
    judge, data = find("detectors", name)(), world.load()
    vae = load("emoji-unet").pipeline.vae
    index = torch.arange(0, len(data.rgba), 4)
    images = data.compose(index, index % len(world.BACKGROUNDS))
    seen = [images, reconstruct(vae, images)]
    logits = [judge.logits(calibrate.unseen(x, loop.rng(5, turn)))["concept"] for turn, x in enumerate(seen)]
    fresh = float((torch.cat(logits).argmax(1) == data.concept[index].repeat(2)).float().mean())
    points = [judge.operating_point(Concept.of(concept)) for concept in data.concepts]
    claimed = sum(point.sensitivity.value for point in points) / len(points)
    assert fresh == pytest.approx(claimed, abs=0.03)
    # clusters are renders, not images: at most four hands in each of five styles
    assert all(point.sensitivity.clusters < 20 < point.sensitivity.n for point in points)


@pytest.mark.parametrize("name", [*JUDGES, "clip_zero_shot"])
def test_an_unknown_concept_is_refused_by_name(name):
    judge = find("detectors", name)()
    with pytest.raises(InputError, match="zeppelin"):
        judge.score(torch.rand(1, 3, 64, 64), Concept.of("zeppelin"))


def test_calibrations_cover_every_concept_and_style():
    data = world.load()
    for folder in ("judge-cnn", "judge-vit", "emoji-clip"):
        table = json.loads((EMBEDDED / folder / "calibration.json").read_text())
        assert set(table["concept"]) == set(data.concepts)
        assert set(table["style"]) == set(data.styles)
