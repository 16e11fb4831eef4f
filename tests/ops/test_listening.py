"""Cross-attention maps against the network's own, and the arithmetic of masks on them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.core.generator import Hook
from expunge.models.load import load
from expunge.ops.listening import CrossTap, grid, heat, listen, on_grid, region
from expunge.ops.scenes import Scenes
from expunge.ops.wording import sentences


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-sdxl"])
def test_maps_are_what_the_layers_attend_by(name: str) -> None:
    """Maps times values, through the layer's own output matrix, are what the layer gave."""
    model: Any = load(name)
    cond = model.encode(["red cat", "blue car"])
    state = model.visit(cond, rng=Run().rng("state"), guidance_scale=1.0, steps=3)
    paths = [s.path.removesuffix(".to_k.weight") for s in model.sites("cross_kv") if s.role == "key"]
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: seen.update({name: output})

    tap = CrossTap.of(model)
    own = [Hook(f"{path}{part}", keep(f"{path}{part}")) for path in paths for part in ("", ".to_v")]
    model.view(hooks=(*tap.hooks, *own)).predict(state, cond)
    assert len(tap.maps()) == len(paths)
    for path, maps in zip(paths, tap.maps(), strict=True):
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
        values = seen[f"{path}.to_v"].unflatten(-1, (maps.shape[1], -1)).transpose(1, 2)
        layer = model.network.get_submodule(path)
        given = layer.to_out[0]((maps @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(given, seen[path], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(layer.to_out[0](values.mean(2, keepdim=True).transpose(1, 2).flatten(2)), seen[path])


def test_maps_follow_a_view_s_weights_and_leave_no_hook() -> None:
    model: Any = load("tiny-unet")
    cond = model.encode(["red cat"])
    state = model.visit(cond, rng=Run().rng("state"), guidance_scale=1.0, steps=3)
    key = next(site for site in model.sites("cross_kv") if site.role == "key")
    plain, deaf = listen(model, state, cond), listen(model.view(weights={key.path: 0 * key.weight}), state, cond)
    torch.testing.assert_close(deaf[0], torch.full_like(deaf[0], 1 / deaf[0].shape[-1]))
    assert not torch.allclose(plain[0], deaf[0])
    assert not any(module._forward_hooks for module in model.network.modules())


def test_models_without_text_keys_of_this_kind_are_refused() -> None:
    with pytest.raises(InputError, match="'tiny-flux' of family 'mmdit' has no cross-attention"):
        CrossTap.of(load("tiny-flux"))


def test_grids_halve_as_the_network_does() -> None:
    assert grid(64, 64, 1024) == (32, 32)
    assert grid(96, 64, 24 * 16) == (24, 16)
    assert grid(9, 7, 5 * 4) == (5, 4)
    with pytest.raises(InputError, match="a layer has 7 image positions, which no halving of 8 x 8 gives"):
        grid(8, 8, 7)


def test_masks_at_a_layer_s_resolution() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4, 4:] = True
    assert on_grid(mask, 16).reshape(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[0] * 4] * 2
    assert torch.equal(on_grid(mask, 64), mask.flatten(1).float())
    large = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)  # a segmenter's, at the picture's size
    assert torch.equal(on_grid(large, 64), on_grid(mask, 64))


def test_heat_is_found_where_the_words_are_attended_to() -> None:
    maps = torch.full((1, 2, 16, 5), 0.1)
    maps[0, :, 5, 3] = 0.6
    columns = torch.tensor([[False, False, False, True, False]])
    warm = heat([maps, maps], columns, 8, 8)
    found = region(warm, 0.5)[0]
    assert bool(found[2:4, 2:4].all()) and not bool(found[5:].any()) and not bool(found[:, 5:].any())
    assert not bool(region(heat([maps], ~columns, 8, 8), 0.5).any())  # flat: no region
    assert int(region(warm, 0.05).sum()) > int(found.sum())
    torch.testing.assert_close(heat([maps], columns, 4, 4).flatten()[5], torch.tensor(0.6))


def test_scenes_are_of_the_seed_and_their_masks_of_the_latent_s_size() -> None:
    model: Any = load("tiny-unet")
    lines = sentences(("{}", "the {} on a car"), ["red cat", "dog"])
    one, two, other = (Scenes.drawn(model, lines, Run(seed=seed), guidance_scale=2.0, steps=2) for seed in (0, 0, 1))
    assert torch.equal(one.images, two.images) and not torch.equal(one.images, other.images)
    assert torch.equal(one.clean, model.absorb(one.images))
    masks = one.masks(model, "attention", 0.5, "middle", Run())
    assert masks.shape == (4, 8, 8) and bool(masks.flatten(1).any(1).all()) and not bool(masks.all())
    assert bool(one.masks(model, "whole", 0.5, "middle", Run()).all())
