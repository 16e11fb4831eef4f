"""Loading: a stock folder gives the same images, and every way it can be wrong is one clear line."""

import json
import shutil

import pytest
import torch
from diffusers import LCMScheduler
from safetensors.torch import load_file, save_file

from expunge.core.errors import InputError
from expunge.models import _names
from expunge.models import load as loader
from expunge.models.load import load
from expunge.models.skeleton import skeleton
from expunge.models.tiny import tiny_pipeline
from expunge.models.unet import UNetGenerator

from .conftest import FLOWS, NAMES, UNETS


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for name in NAMES:
        tiny_pipeline(name).save_pretrained(root / name)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    """A fresh copy of the SD 1.x type folder, to be damaged."""
    return shutil.copytree(saved / "tiny-unet", tmp_path / "model")


def refused(path, *words):
    """The message of the InputError that loading `path` must raise: one line, with these words in it."""
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def alike(name, images, others):
    """U-Nets bit for bit; in MMDiTs the same numbers at another place in memory have been seen to round differently."""
    return torch.equal(images, others) if name in UNETS else (images - others).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_folder_gives_the_same_model(saved, models, name, capfd):
    model = load(saved / name)
    given = {"seeds": [5], "guidance_scale": 4.0, "steps": 5}
    assert alike(name, model.generate(["strawberry"], **given), models[name].generate(["strawberry"], **given))
    again, before = model.parameters_by_path(), models[name].parameters_by_path()
    assert all(torch.equal(again[path], before[path]) for path in before)
    assert model.name == str(saved / name)
    assert list(model.parameters_by_path()) == list(models[name].parameters_by_path())
    assert not any(tensor.requires_grad for tensor in model.network.parameters()) and not model.network.training
    assert capfd.readouterr() == ("", "")


def test_half_precision_files_are_computed_in_float32_unless_asked(saved, tmp_path):
    place = tmp_path / "half"
    tiny_pipeline("tiny-unet-v", dtype=torch.float16).save_pretrained(place)
    assert {tensor.dtype for tensor in load(place).network.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in load(place, dtype="bfloat16").network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["tiny-unet", *FLOWS])
def test_merged_view_survives_the_disk(models, tmp_path, name):
    model = models[name]
    edited = model.view(weights={path: -tensor for path, tensor in model.select("text_in").items()})
    edited.merged().save_pretrained(tmp_path / "merged")
    given = {"seeds": [5], "guidance_scale": 4.0, "steps": 5}
    again = load(tmp_path / "merged").generate(["strawberry"], **given)
    assert alike(name, again, edited.generate(["strawberry"], **given))


def test_embedded_models_are_folders(saved, models, monkeypatch):
    monkeypatch.setattr(_names, "EMBEDDED", saved)
    assert _names.embedded_names(saved) == tuple(sorted(NAMES))
    place = saved / "berry-unet"
    shutil.copytree(saved / "tiny-unet", place)
    monkeypatch.setattr(loader, "EMBEDDED", saved)
    monkeypatch.setattr(loader, "embedded_names", lambda: _names.embedded_names(saved))
    assert load("berry-unet").name == "berry-unet"
    shutil.rmtree(place)


def test_unknown_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("unicorn", "unknown model 'unicorn'", "tiny-unet", "a diffusers folder")
    refused("hf:nobody/nothing", "HF_HUB_OFFLINE is set")
    refused("hf:nobody", "not of the form ORG/NAME")
    refused(tmp_path / "absent", "unknown model")
    single = tmp_path / "model.safetensors"
    single.write_bytes(b"x")
    refused(single, "single file", "diffusers folder")


def test_hub_failure_is_one_line(monkeypatch):
    def absent(*args, **named):
        raise OSError("Repository Not Found\n\nmore lines")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(loader.DiffusionPipeline, "download", absent)
    refused("hf:nobody/nothing", "the hub does not give", "Repository Not Found")


def test_a_misspelt_path_never_reaches_the_hub(monkeypatch):
    def reached(*args, **named):
        raise AssertionError("asked the hub")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(loader.DiffusionPipeline, "download", reached)
    refused("runs/bery", "unknown model 'runs/bery'", "hf:ORG/NAME")
    with pytest.raises(AssertionError, match="asked the hub"):
        load("hf:runs/bery")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part(folder, part):
    shutil.rmtree(folder / part)
    refused(folder, "has no part", repr(part))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_part_without_config(folder, part):
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.unlink()
    refused(folder, part, file.name)


def test_part_without_files(folder):
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    refused(folder, "tokenizer", "tokenizer.json")


def test_index(folder):
    (folder / "model_index.json").write_text("{ not json")
    refused(folder, "model_index.json", "not JSON")
    (folder / "model_index.json").write_text("[]")
    refused(folder, "JSON object")
    (folder / "model_index.json").unlink()
    refused(folder, "no model_index.json")


@pytest.mark.parametrize("kind", ["KolorsPipeline", "StableDiffusionInpaintPipeline", None])
def test_wrong_pipeline_class(folder, kind):
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = kind
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(folder, repr(kind), "FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXL")


def test_wrong_part_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "T5EncoderModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    refused(folder, "'text_encoder'", "T5EncoderModel", "CLIPTextModel")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_truncated_weights(folder, part, keep):
    file = next((folder / part).glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    refused(folder, str(file), "truncated or damaged")


def test_damaged_header(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)
    refused(folder, str(file), "truncated or damaged")


def test_missing_weights(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    refused(folder, "'unet'", "no diffusion_pytorch_model.safetensors", "pickled weights are not read")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_tensor_is_never_filled_at_random(folder, part):
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    lost = sorted(tensors)[3]
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(folder, part, lost.split(".")[-1])


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_misfitting_tensor(folder, part):
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[3]
    tensors[name] = torch.zeros(3, 5)
    save_file(tensors, file, metadata={"format": "pt"})
    refused(folder, part)


QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": "int8wo"},
    "gguf": {"quant_method": "gguf", "compute_dtype": "bfloat16"},
    "unnamed": {"load_in_8bit": True},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize(
    ("name", "part"),
    [("tiny-unet", "unet"), ("tiny-unet", "text_encoder"), ("tiny-flux", "transformer"), ("tiny-flux", "vae")],
)
def test_a_quantised_part_is_refused_before_it_is_read(saved, tmp_path, name, part, method):
    """By its configuration alone: other libraries are never asked whether they could."""
    place = shutil.copytree(saved / name, tmp_path / "model")
    assert load(place).family and skeleton(place).family
    file = place / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": QUANTISED[method]}))
    for weights in place.glob("*/*.safetensors"):
        weights.write_bytes(b"")
    words = (repr(str(place)), f"quantised in part {part!r}", repr(method), "legal: a folder of float32")
    refused(place, *words)
    with pytest.raises(InputError) as caught:
        skeleton(place)
    assert all(word in str(caught.value) for word in words)
    file = tmp_path / "one.safetensors"
    save_file({"weight": torch.ones(1)}, file)
    refused(f"{file}@{place}", *words)


def test_a_quantised_part_that_is_not_used_does_not_matter(folder):
    """A safety checker beside the model, which is never opened."""
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text(json.dumps({"quantization_config": QUANTISED["gguf"]}))
    assert load(folder).family == "unet"


def test_missing_shard(folder):
    place = folder / "unet"
    tensors = load_file(place / "diffusion_pytorch_model.safetensors")
    (place / "diffusion_pytorch_model.safetensors").unlink()
    names = {key: "part-1.safetensors" for key in tensors}
    (place / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, "part-1.safetensors", "is missing")


def test_models_it_would_misread():
    pipeline = tiny_pipeline("tiny-unet")
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, prediction_type="sample")
    with pytest.raises(InputError, match="predicts 'sample'; legal: epsilon, v_prediction"):
        UNetGenerator(pipeline, "x")
    for field, value in (("in_channels", 9), ("time_cond_proj_dim", 256), ("class_embed_type", "timestep")):
        pipeline = tiny_pipeline("tiny-unet")
        pipeline.unet.register_to_config(**{field: value})
        with pytest.raises(InputError, match=r"reads 9 channels|sets '(time_cond_proj_dim|class_embed_type)'"):
            UNetGenerator(pipeline, "x")


def test_devices_and_dtypes():
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        load("tiny-unet", device="gpu")
    with pytest.raises(InputError, match="unknown dtype 'int4'; legal: bfloat16, float16, float32"):
        load("tiny-unet", dtype="int4")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="'cuda' is not available"):
            load("tiny-unet", device="cuda")


def test_unsupported_sampler_is_refused():
    pipeline = tiny_pipeline("tiny-unet")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(InputError, match=r"LCMScheduler.*legal: DDIMScheduler"):
        UNetGenerator(pipeline, "x")
