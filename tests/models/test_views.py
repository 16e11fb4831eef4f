"""Views: the network never changes, views stack, gradients reach the replaced weights, hooks leave nothing behind."""

import pytest
import torch

from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook

from .conftest import UNETS, digest, seeded, stock


def some_state(model, size=2):
    return model.noised(torch.randn(size, *model.latent, generator=seeded()), rng=seeded(1))


class Pass:
    """A guard that intervenes nowhere."""

    def condition(self, cond):
        return cond

    def combine(self, model, state, cond, uncond, scale):
        return uncond + scale * (cond - uncond)

    def image(self, images):
        return images


class Shift(Pass):
    """Adds `by` times the guidance direction, and remembers the levels it was asked at."""

    def __init__(self, by):
        self.by, self.levels = by, []

    def combine(self, model, state, cond, uncond, scale):
        self.levels.append(state.t.clone())
        return uncond + (scale + self.by) * (cond - uncond)


class Blank(Pass):
    def condition(self, cond):
        return cond.take(torch.zeros(len(cond), dtype=torch.long))

    def image(self, images):
        return 1 - images


def embedded(model):
    """Whether guidance is an input of the network instead of a combination of two predictions."""
    return model.family == "mmdit" and model.distilled


def test_is_a_generator(model):
    assert isinstance(model, Generator) and isinstance(model.view(), Generator)
    assert model.family == ("unet" if model.name in UNETS else "mmdit")


def test_weights_change_the_view_and_nothing_else(model):
    state, cond = some_state(model), model.encode(["strawberry"])
    before = model.predict(state, cond)
    edited = model.view(weights={path: 2 * tensor for path, tensor in model.select("cross_kv").items()})
    assert not torch.allclose(edited.predict(state, cond), before, atol=1e-2)
    assert torch.equal(model.predict(state, cond), before)
    path = next(iter(model.select("cross_kv")))
    assert torch.equal(edited.weight(path), 2 * model.weight(path))
    assert torch.equal(edited.parameters_by_path()[path], 2 * model.parameters_by_path()[path])
    assert torch.equal(edited.select("cross_kv")[path], edited.weight(path))
    assert torch.equal(edited.sites("text_in")[0].weight, edited.weight(edited.sites("text_in")[0].path))


def test_views_stack_and_the_last_wins(model):
    state, cond = some_state(model), model.encode(["strawberry"])
    first, second = list(model.select("cross_kv"))[:2]
    one = model.view(weights={first: model.weight(first) * 3})
    both = one.view(weights={second: model.weight(second) * 3})
    together = model.view(weights={first: model.weight(first) * 3, second: model.weight(second) * 3})
    assert torch.equal(both.predict(state, cond), together.predict(state, cond))
    assert not torch.equal(both.predict(state, cond), one.predict(state, cond))
    back = both.view(weights={first: model.weight(first), second: model.weight(second)})
    assert torch.equal(back.predict(state, cond), model.predict(state, cond))


def test_training_through_a_view_leaves_the_network_alone(model):
    state, cond = some_state(model), model.encode(["strawberry"])
    goal = model.predict(state, model.encode([""]))
    masters = {path: tensor.clone().requires_grad_() for path, tensor in model.select("cross_attention").items()}
    # SD3's last block drops its text: these queries are in the files and in no image
    idle = {path for path in masters if path.startswith("transformer.transformer_blocks.2") and "added_q" in path}
    idle |= {path for path in masters if path.startswith("transformer.transformer_blocks.2") and "add_q" in path}
    optimizer = torch.optim.Adam(masters.values(), lr=2e-3)
    losses = []
    for _ in range(12):
        loss = model.distance(model.view(weights=masters).predict(state, cond), goal).mean()
        optimizer.zero_grad()
        loss.backward()
        unmoved = {path for path, tensor in masters.items() if tensor.grad is None or tensor.grad.abs().sum() == 0}
        assert unmoved == idle
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in model.network.parameters())


def test_gradients_reach_text_encoders_and_embeddings(model):
    state = some_state(model)
    masters = {path: tensor.clone().requires_grad_() for path, tensor in model.select("text_encoder").items()}
    cond = model.view(weights=masters).encode(["strawberry"])
    model.distance(model.predict(state, cond), torch.zeros_like(state.x)).mean().backward()
    reached = [path for path, tensor in masters.items() if tensor.grad is not None and tensor.grad.abs().sum() > 0]
    assert len(reached) > len(masters) / 2
    assert any("token_embedding" in path for path in reached)


def test_half_precision_network_takes_fp32_masters(models):
    from expunge.models.load import load

    model = load("tiny-unet", dtype="bfloat16")
    before, state = digest_half(model), some_state(model)
    masters = {path: tensor.float().requires_grad_() for path, tensor in model.select("cross_kv").items()}
    pred = model.view(weights=masters).predict(state, model.encode(["strawberry"]))
    assert torch.equal(pred, model.predict(state, model.encode(["strawberry"])))
    pred.float().square().mean().backward()
    assert all(tensor.grad.dtype == torch.float32 and tensor.grad.norm() > 0 for tensor in masters.values())
    assert digest_half(model) == before


def digest_half(model):
    return sum(tensor.double().abs().sum().item() for tensor in model.network.parameters())


def test_hooks_replace_outputs_and_leave_nothing(model):
    state, cond = some_state(model), model.encode(["strawberry"])
    path = model.sites("text_in")[1].path.removesuffix(".weight")
    muted = model.view(hooks=[Hook(path, lambda module, inputs, output: torch.zeros_like(output))])
    before, hooked = model.predict(state, cond), muted.predict(state, cond)
    layer = [name for name in (f"{path}.weight", f"{path}.bias") if name in model.parameters_by_path()]
    zeroed = model.view(weights={name: torch.zeros_like(model.weight(name)) for name in layer})
    assert torch.equal(hooked, zeroed.predict(state, cond)) and not torch.equal(hooked, before)
    assert torch.equal(model.predict(state, cond), before)
    watched = []
    stacked = muted.view(hooks=[Hook(path, lambda module, inputs, output: watched.append(output.abs().max().item()))])
    assert torch.equal(stacked.predict(state, cond), hooked)
    assert watched == [0.0]  # the second hook sees what the first left, and may only look


def test_hooks_are_removed_when_the_call_fails(model):
    def fail(module, inputs, output):
        raise ArithmeticError("stop")

    before = digest(model)
    path = model.sites("text_in")[0].path.removesuffix(".weight")
    with pytest.raises(ArithmeticError):
        model.view(hooks=[Hook(path, fail)]).predict(some_state(model), model.encode([""]))
    assert digest(model) == before


def test_passing_guard_is_the_identity(model):
    given = {"seeds": [1, 2], "guidance_scale": 4.0, "steps": 5}
    plain = model.generate(["strawberry", "cat"], **given)
    once = model.view(guards=[Pass()]).generate(["strawberry", "cat"], **given)
    assert (once - plain).abs().max() <= (1e-4 if embedded(model) else 0)  # there a guard adds a pass for ""
    twice = model.view(guards=[Pass()]).view(guards=[Pass()]).generate(["strawberry", "cat"], **given)
    assert torch.allclose(twice, plain, atol=1e-4)


def test_guards_combine_condition_and_finish(model):
    given = {"seeds": [1], "guidance_scale": 4.0, "steps": 5}
    plain = model.generate(["strawberry"], **given)
    shift = Shift(2.0)
    more = model.view(guards=[shift]).generate(["strawberry"], **given)
    stronger = model.generate(["strawberry"], seeds=[1], guidance_scale=6.0, steps=5)
    assert torch.allclose(more, stronger, atol=1e-4) != embedded(model) and not torch.allclose(more, plain, atol=1e-2)
    levels = torch.cat(shift.levels)
    assert len(levels) == 5 and (levels[:-1] > levels[1:]).all() and 0 < levels[-1] < levels[0] <= 1
    negative = model.view(guards=[Blank()]).generate(["strawberry"], **given)
    assert (negative - (1 - plain)).abs().max() <= (1e-4 if embedded(model) else 0)


def test_guards_stack(model):
    """The second guard combines the prediction that explains the first one's result: two shifts multiply.

    u + (w + a) d = u + w d' with d' = (1 + a / w) d, and then u + (w + b) d' = u + (w + b)(1 + a / w) d.
    """
    given = {"seeds": [1], "steps": 4}
    both = model.view(guards=[Shift(2.0), Shift(-1.0)]).generate(["strawberry"], guidance_scale=4.0, **given)
    once = model.view(guards=[Shift(0.5)]).generate(["strawberry"], guidance_scale=4.0, **given)
    assert torch.allclose(both, once, atol=1e-4)
    if not embedded(model):
        same = model.generate(["strawberry"], guidance_scale=3.0 * 1.5, **given)
        assert torch.allclose(both, same, atol=1e-4)
    with pytest.raises(InputError, match="guidance scale 0"):
        model.view(guards=[Pass(), Pass()]).generate(["strawberry"], guidance_scale=0.0, **given)


def test_merged_pipeline_draws_what_the_view_draws(model):
    weights = {path: 1.5 * tensor for path, tensor in model.select("cross_kv").items()}
    encoder, tensor = next(iter(model.select("text_encoder").items()))
    edited = model.view(weights={**weights, encoder: -tensor})
    pipeline = edited.merged()
    pipeline.set_progress_bar_config(disable=True)
    again = type(model)(pipeline, model.name)
    ours = edited.generate(["strawberry"], seeds=[4], guidance_scale=3.0, steps=5)
    assert (ours - stock(again, ["strawberry"], [4], 3.0, 5)).abs().max() <= 1e-5
    assert torch.equal(ours, again.generate(["strawberry"], seeds=[4], guidance_scale=3.0, steps=5))
    part = "unet" if model.family == "unet" else "transformer"
    assert pipeline.vae is model.pipeline.vae and getattr(pipeline, part) is not getattr(model.pipeline, part)
    with pytest.raises(InputError, match="guards or hooks"):
        model.view(guards=[Pass()]).merged()


def test_bad_weights_and_hooks(model):
    path = model.sites("text_in")[0].path
    with pytest.raises(InputError, match=r"has no parameter 'unet.nowhere.weight'"):
        model.view(weights={"unet.nowhere.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="has no parameter 'x'"):
        model.weight("x")
    with pytest.raises(InputError, match=r"has shape \[\d+, \d+\], not \[3\]"):
        model.view(weights={path: torch.zeros(3)})
    with pytest.raises(InputError, match=r"has no module 'unet\.attic'; parts: (unet|transformer), text_encoder"):
        model.view(hooks=[Hook("unet.attic", lambda *_: None)])
