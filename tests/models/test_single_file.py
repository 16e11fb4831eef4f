"""One-file checkpoints: read back as they were written, told by their tensors, and refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file

from expunge.core.errors import InputError
from expunge.models._names import parted, settled
from expunge.models.load import load
from expunge.models.original import UNET, checkpoint, layout
from expunge.models.single_file import kind_of
from expunge.models.tiny import tiny_pipeline
from stages.exports import folder as saved_folder

FLUX = {"in_channels": 64, "num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}  # FLUX.1-dev, 2 + 2 blocks
SD35 = {  # SD3.5-medium's shape in 3 blocks, the first of them with attention of the image to itself
    "sample_size": 128,
    "patch_size": 2,
    "num_layers": 3,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
READERS = {
    "flux": (FluxTransformer2DModel, FLUX, convert_flux_transformer_checkpoint_to_diffusers),
    "sd3": (SD3Transformer2DModel, SD35, convert_sd3_transformer_checkpoint_to_diffusers),
}


@pytest.mark.parametrize("cls, config, reader", READERS.values(), ids=READERS.keys())
def test_transformers_at_real_widths_against_diffusers_own_reader(cls, config, reader) -> None:
    """Every row of every tensor: matrices are one column wide here, which the reader does not look at."""
    with torch.device("meta"):
        network = cls(**config)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    rng = torch.Generator().manual_seed(0)
    thin = {
        name: torch.randn(shape[0], *((1,) if len(shape) > 1 else ()), generator=rng) for name, shape in shapes.items()
    }
    entries = layout({"transformer": network})
    file = {
        entry.name: entry.stored({f"transformer.{name}": tensor for name, tensor in thin.items()}) for entry in entries
    }
    assert sum(len(entry.paths) for entry in entries) == len(shapes)
    back = reader(dict(file))
    assert set(back) == set(thin) and all(torch.equal(back[name], thin[name]) for name in thin)
    rows = {f"transformer.{name}": shape[0] for name, shape in shapes.items()}
    own = {path: tensor for entry in entries for path, tensor in entry.restored(file[entry.name], rows).items()}
    assert set(own) == set(rows) and all(torch.equal(own[f"transformer.{name}"], thin[name]) for name in thin)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder and its weights as one file, header included."""
    root = tmp_path_factory.mktemp("single")
    place = saved_folder("tiny-unet", root / "base")
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint(load(place)).items()}
    save_file(tensors, root / "one.safetensors", metadata={"licence": "cc-by-4.0", "attribution": "Somebody"})
    return root


def altered(base, tmp_path, change):
    """The file with its tensors changed by a function."""
    tensors = load_file(base / "one.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return f"{tmp_path / 'changed.safetensors'}@{base / 'base'}"


def refused(name, *words):
    with pytest.raises(InputError) as caught:
        load(name)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_names_are_parted_and_made_absolute(base, tmp_path, monkeypatch) -> None:
    assert parted("a@b.safetensors@c/d@e") == (Path("a@b.safetensors"), "c/d@e")
    assert parted("tiny-unet") is None and parted("some/folder@here") is None
    monkeypatch.chdir(base)
    assert settled("one.safetensors@base") == f"{base.resolve() / 'one.safetensors'}@{(base / 'base').resolve()}"
    assert settled("one.safetensors@emoji-unet").endswith("one.safetensors@emoji-unet")


def test_half_precision_files_are_cast(base, tmp_path) -> None:
    def halve(tensors):
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    name = altered(base, tmp_path, halve)
    assert {tensor.dtype for tensor in load(name).network.parameters()} == {torch.float32}
    model = load(name, dtype="bfloat16")
    assert {tensor.dtype for tensor in model.network.parameters()} == {torch.bfloat16}
    assert not any(tensor.requires_grad for tensor in model.network.parameters()) and not model.network.training


def test_what_files_hold_besides_is_overlooked(base, tmp_path) -> None:
    def add(tensors):
        tensors["model_ema.decay"] = torch.ones(1)
        tensors["alphas_cumprod"] = torch.ones(1000)
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(24)[None]

    again, plain = load(altered(base, tmp_path, add)), load(base / "base")
    assert all(torch.equal(again.weight(path), tensor) for path, tensor in plain.parameters_by_path().items())


def test_parts_that_are_not_in_the_file_come_from_the_folder(base, tmp_path) -> None:
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("cond_stage_model.")]:
            del tensors[name]

    name = altered(base, tmp_path, drop)
    again, plain = load(name), load(base / "base")
    assert all(torch.equal(again.weight(path), tensor) for path, tensor in plain.parameters_by_path().items())
    bare = shutil.copytree(base / "base", tmp_path / "bare")
    (bare / "text_encoder" / "model.safetensors").unlink()
    refused(f"{tmp_path / 'changed.safetensors'}@{bare}", "has no part 'text_encoder'", "no weights for it")


def test_a_folder_of_configurations_alone_is_enough(base, tmp_path) -> None:
    bare = shutil.copytree(base / "base", tmp_path / "bare")
    for file in bare.glob("*/*.safetensors"):
        file.unlink()
    again, plain = load(f"{base / 'one.safetensors'}@{bare}"), load(base / "base")
    assert all(torch.equal(again.weight(path), tensor) for path, tensor in plain.parameters_by_path().items())


def test_a_bare_flux_transformer_as_it_is_shared(tmp_path) -> None:
    """BFL's files: no prefix, no encoders, no autoencoder; here in half precision."""
    pipeline = tiny_pipeline("tiny-flux-distilled", seed=1)
    pipeline.save_pretrained(tmp_path / "other")
    tiny_pipeline("tiny-flux-distilled").save_pretrained(tmp_path / "base")
    whole = checkpoint(load(tmp_path / "other"))
    bare = {name.removeprefix(UNET): whole[name].to(torch.bfloat16) for name in whole if name.startswith(UNET)}
    save_file({name: tensor.contiguous() for name, tensor in bare.items()}, tmp_path / "bare.safetensors")
    mixed, other, plain = (
        load(tmp_path / place) for place in (f"bare.safetensors@{tmp_path / 'base'}", "other", "base")
    )
    for path, tensor in mixed.parameters_by_path().items():
        source = (
            other.weight(path).to(torch.bfloat16).float() if path.startswith("transformer.") else plain.weight(path)
        )
        assert torch.equal(tensor, source)


def test_pickles_and_lonely_files(base, tmp_path) -> None:
    place = tmp_path / "model.ckpt"
    place.write_bytes(b"\x80\x04.")
    refused(place, "pickled", "never read", "safetensors")
    refused(f"{place}@{base / 'base'}", "pickled", "never read")
    refused(base / "one.safetensors", "single file", "@FOLDER")
    refused(f"{base / 'one.safetensors'}@nowhere", "unknown folder 'nowhere'", "a local diffusers folder")
    refused(f"{tmp_path / 'absent.safetensors'}@{base / 'base'}", "no file")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((base / "one.safetensors").read_bytes()[:-1])
    refused(f"{torn}@{base / 'base'}", "truncated or damaged")


def test_zero_matched_layers_is_loud(base, tmp_path) -> None:
    for name, what in (
        ("unet.mid.attn.lora_A.weight", "an adapter"),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers' names"),
        ("weight", "nothing that is known"),
    ):
        save_file({name: torch.ones(2)}, tmp_path / "odd.safetensors")
        refused(f"{tmp_path / 'odd.safetensors'}@{base / 'base'}", "no layer of", "matches", what)


def test_the_kind_is_told_by_tensors(base, tmp_path) -> None:
    assert kind_of(load_file(base / "one.safetensors")) == "StableDiffusionPipeline"
    tiny_pipeline("tiny-flux").save_pretrained(tmp_path / "flux")
    refused(f"{base / 'one.safetensors'}@{tmp_path / 'flux'}", "StableDiffusionPipeline", "describes a FluxPipeline")


def test_what_does_not_fit(base, tmp_path) -> None:
    conv, attn = UNET + "input_blocks.0.0.weight", UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"

    def inpainting(tensors):
        tensors[conv] = torch.zeros(tensors[conv].shape[0], 9, 3, 3)

    refused(altered(base, tmp_path, inpainting), conv, "[16, 9, 3, 3]", "[16, 4, 3, 3]")
    refused(altered(base, tmp_path, lambda tensors: tensors.pop(attn)), "lacks 1 of the", attn)
    more = UNET + "input_blocks.99.0.op.weight"
    refused(altered(base, tmp_path, lambda tensors: tensors.update({more: torch.ones(1)})), "no place for", more)
    refused(altered(base, tmp_path, lambda t: t.update({attn: t[attn].to(torch.int8)})), "int8", "quantised")
    refused(altered(base, tmp_path, lambda t: t.update({attn: t[attn].to(torch.float8_e4m3fn)})), "float8", "quantised")


BLOCK = "cond_stage_model.model.transformer.resblocks."
BLOCK_2 = "conditioner.embedders.1.model.transformer.resblocks."


@pytest.mark.parametrize(
    ("name", "prefix", "more"), [("openclip", BLOCK, 1), ("openclip", BLOCK, 2), ("sdxl", BLOCK_2, 1)]
)
def test_the_encoder_layer_that_sd_2_leaves_out(tmp_path, name, prefix, more) -> None:
    """SD 2.x files hold one layer of OpenCLIP more than its configuration, which reads the last but one; not two more.

    SDXL's second encoder is whole in both, and its file has none to spare.
    """
    place = saved_folder(name, tmp_path / "base")
    plain = load(place)
    tensors = {key: tensor.contiguous() for key, tensor in checkpoint(plain).items()}
    part = "text_encoder" if name == "openclip" else "text_encoder_2"
    depth = json.loads((place / part / "config.json").read_text())["num_hidden_layers"]
    last = f"{prefix}{depth - 1}."
    assert any(key.startswith(last) for key in tensors)
    for layer in range(depth, depth + more):
        own = [key for key in tensors if key.startswith(last)]
        tensors |= {f"{prefix}{layer}.{key.removeprefix(last)}": tensors[key] + 1 for key in own}
    save_file(tensors, tmp_path / "one.safetensors")
    if (name, more) != ("openclip", 1):
        refused(f"{tmp_path / 'one.safetensors'}@{place}", "no place for", f"{prefix}{depth + more - 1}.")
        return
    again = load(f"{tmp_path / 'one.safetensors'}@{place}")
    assert all(torch.equal(again.weight(path), tensor) for path, tensor in plain.parameters_by_path().items())


def test_a_folder_that_cannot_be_built(base, tmp_path) -> None:
    bad = shutil.copytree(base / "base", tmp_path / "bad")
    config = json.loads((bad / "unet" / "config.json").read_text())
    (bad / "unet" / "config.json").write_text(json.dumps({**config, "down_block_types": ["Nonsense"]}))
    refused(f"{base / 'one.safetensors'}@{bad}", "'unet'", "cannot be built")
