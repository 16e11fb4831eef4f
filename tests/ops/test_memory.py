"""What saves memory changes no gradient: recomputation, low rank beside the matrices, half precision, no encoders."""

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expunge.core.eraser import Run
from expunge.core.errors import InputError
from expunge.models.load import load
from expunge.ops.listening import CrossTap
from expunge.ops.student import LowRankStudent, Student
from expunge.ops.surgery import surgical
from expunge.ops.tap import Tap, attention

PROMPTS = ["red cat", "a dog", "guitar"]  # three: no activation shall have a matrix's shape
MODELS = ("tiny-unet", "tiny-sd3", "tiny-flux-distilled")
FLOAT = {"rtol": 1e-4, "atol": 1e-7}  # of gradients that are computed again in another order


def scene(model: Any) -> tuple[Any, Any, Tensor]:
    cond = model.encode(PROMPTS)
    state = model.visit(cond, rng=Run().rng("visit"), guidance_scale=2.0, steps=2)
    return cond, state, model.predict(state, model.encode(["guitar"]))


def learner(model: Any, kind: str) -> Any:
    if kind == "full":  # away from the base, or a recomputation with the base's weights would pass
        return Student(model, {p: (1.5 * w).requires_grad_() for p, w in model.select("cross_attention").items()})
    paths = [site.path for site in model.sites("cross_kv")]
    student = LowRankStudent.of(model, paths, rank=2, rng=Run().rng("factors"))
    with torch.no_grad():
        for factor in student.parameters[1::2]:
            factor.normal_(std=0.2, generator=Run().rng("up", factor.shape[0]))
    return student


def gradients(model: Any, kind: str, seen: tuple[Any, Any, Tensor], *, maps: bool = False) -> tuple[Tensor, ...]:
    cond, state, goal = seen
    student, view = (made := learner(model, kind)), made.view()
    if maps:
        tap = CrossTap.of(model) if model.family == "unet" else Tap.of(model)
        pred = view.view(hooks=tap.hooks).predict(state, cond)
        looked = tap.maps()[0] if isinstance(tap, CrossTap) else tap.text_maps()
        loss = model.distance(pred, goal).mean() + looked.square().sum()
    else:
        loss = model.distance(view.predict(state, cond), goal).mean()
    return torch.autograd.grad(loss, student.parameters, materialize_grads=True)


def apart(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
    """Distance of two gradients as a share of the second's length."""
    a, b = (torch.cat([grad.flatten() for grad in grads]) for grads in (one, two))
    return float((a - b).norm() / b.norm())


class Watch(TorchDispatchMode):
    """Shapes of all tensors that are made anew; views and changes in place are not."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.shapes += [tuple(tensor.shape) for tensor in made if _place(tensor) not in given]
        return result


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kept(model: Any, seen: tuple[Any, Any, Tensor]) -> int:
    """Bytes that a prediction's graph saves beside the network's own; inputs of recomputed blocks are not counted."""
    cond, state, _ = seen
    own = {_place(tensor) for tensor in model.network.parameters()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _place(tensor) not in own:
            sizes[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    student = learner(model, "low")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student.view().predict(state, cond)
    return sum(sizes.values())


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_no_gradient_and_keeps_less(name: str) -> None:
    plain, again = load(name), load(name, checkpointing=True)
    seen = scene(plain)
    for kind in ("full", "low"):
        for maps in (False, True):
            expected = gradients(plain, kind, seen, maps=maps)
            assert sum(float(grad.norm()) for grad in expected) > 0
            for one, two in zip(gradients(again, kind, seen, maps=maps), expected, strict=True):
                torch.testing.assert_close(one, two, **FLOAT)
    assert kept(again, seen) < 0.7 * kept(plain, seen)
    assert not any(module._forward_hooks for module in again.network["vae"].modules())
    denoiser = again.network["unet" if again.family == "unet" else "transformer"]
    assert not any(module._forward_hooks for module in denoiser.modules())


@pytest.mark.parametrize("name", MODELS)
def test_resting_parts_are_awake_only_while_they_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same gradients, same images; where processor and device are one, the journeys themselves are what can be seen.

    On a device of its own: below.
    """
    plain, resting = load(name), load(name, offload=True)
    journeys: list[tuple[str, str]] = []
    for part, module in resting.network.items():
        move = module.to
        monkeypatch.setattr(module, "to", lambda place, p=part, m=move: (journeys.append((p, str(place))), m(place))[1])
    seen = scene(plain)
    for one, two in zip(gradients(resting, "low", seen), gradients(plain, "low", seen), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not journeys  # neither prompts nor pixels were touched
    asked = {"seeds": [1], "guidance_scale": 2.0, "steps": 2}
    torch.testing.assert_close(resting.generate(["cat"], **asked), plain.generate(["cat"], **asked), rtol=0, atol=1e-5)
    parts = {part for part, _ in journeys}
    assert parts == set(plain.network) - {"unet", "transformer"} == resting.resting
    assert [place for _, place in journeys] == [str(plain.device), "cpu"] * (len(journeys) // 2)


SLOW = pytest.mark.slow  # a process of its own, which imports everything


def elsewhere(*words: str) -> tuple[int, str]:
    """Exit code and last line of tests/ops/other_device.py."""
    script = Path(__file__).with_name("other_device.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, check=False)
    return done.returncode, (done.stderr if done.returncode else done.stdout).strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["tiny-flux", *(pytest.param(n, marks=SLOW) for n in ("tiny-unet", "tiny-sd3"))])
def test_a_device_of_its_own_meets_no_tensor_of_the_processor(name: str) -> None:
    """Encoded, predicted, decoded and every gradient are where the denoiser is; what rests is in main memory again."""
    assert elsewhere(name) == (0, "elsewhere elsewhere elsewhere elsewhere and cpu")


@pytest.mark.parametrize("part", ["vae", pytest.param("text_encoder_2", marks=SLOW)])
def test_a_part_that_nobody_wakes_is_seen(part: str) -> None:
    code, said = elsewhere("tiny-flux", part)
    assert code == 1 and "FakeTensorDeviceMismatchError: Expected all tensors to be on the same device" in said


def test_a_resting_encoder_may_be_replaced() -> None:
    plain, resting = load("tiny-unet"), load("tiny-unet", offload=True)
    weights = {path: 1.5 * tensor for path, tensor in plain.select("text_encoder").items()}
    one, two = (model.view(weights=weights).encode(["cat"]).tokens for model in (plain, resting))
    assert torch.equal(one, two)
    assert not torch.equal(one, plain.encode(["cat"]).tokens)


def test_a_projected_step_may_recompute_inside_the_loss() -> None:
    """Gradients are asked for there too, outside of any backward pass that a loop could prepare."""

    def step(model: Any) -> tuple[Tensor, ...]:
        student = learner(model, "full")
        one, two = (model.distance(student.view().predict(state, c), goal).mean() for c in (cond.take(first), cond))
        return torch.autograd.grad(surgical(one, two, student.parameters, 0.3), student.parameters)

    plain = load("tiny-unet")
    cond, state, goal = scene(plain)
    first = torch.zeros(3, dtype=torch.long)
    for one, two in zip(step(load("tiny-unet", checkpointing=True)), step(plain), strict=True):
        torch.testing.assert_close(one, two, **FLOAT)


@pytest.mark.parametrize("name", MODELS)
def test_low_rank_beside_the_matrix_is_the_sum_and_makes_no_matrix(name: str) -> None:
    model = load(name)
    cond, state, goal = seen = scene(model)
    student = learner(model, "low")
    product = model.view(weights=student.weights())
    torch.testing.assert_close(student.view().predict(state, cond), product.predict(state, cond), rtol=1e-4, atol=1e-5)
    loss = model.distance(product.predict(state, cond), goal).mean()
    expected = torch.autograd.grad(loss, student.parameters, materialize_grads=True)
    assert apart(gradients(model, "low", seen), expected) < 1e-4
    shapes = {tuple(model.weight(path).shape) for path in student.names}
    with Watch() as watch:
        gradients(model, "low", seen)
    with Watch() as control:
        sum(weight.sum() for weight in student.weights().values()).backward()
    assert shapes & set(control.shapes)  # the watch would see it
    assert not shapes & set(watch.shapes)


@pytest.mark.parametrize("name", ["tiny-unet", "tiny-flux-distilled"])
def test_half_precision_points_the_same_way(name: str) -> None:
    """bfloat16 has 8 bits: directions agree to a few degrees, not to a tolerance of floats."""
    seen = scene(load(name))
    fine = torch.cat([grad.flatten() for grad in gradients(load(name), "low", seen)])
    coarse = torch.cat([grad.flatten() for grad in gradients(load(name, dtype="bfloat16"), "low", seen)])
    assert coarse.dtype == torch.float32  # of the masters
    assert torch.nn.functional.cosine_similarity(fine, coarse, dim=0) > 0.97
    assert 0.8 < coarse.norm() / fine.norm() < 1.25


@pytest.mark.parametrize("name", MODELS)
def test_without_encoders_gradients_are_the_same_and_their_memory_goes(name: str) -> None:
    whole, model = load(name), load(name)
    encoders = [part for part in model.network if part.startswith("text_encoder")]
    ghosts = [weakref.ref(parameter) for part in encoders for parameter in model.network[part].parameters()]
    light = model.without_encoders(PROMPTS)
    del model
    gc.collect()
    assert ghosts and not any(ghost() is not None for ghost in ghosts)
    assert not any(path.startswith("text_encoder") for path in light.parameters_by_path())
    torch.testing.assert_close(light.encode(["a dog"]).tokens, whole.encode(["a dog"]).tokens, rtol=1e-4, atol=1e-5)
    assert apart(gradients(light, "low", scene(light)), gradients(whole, "low", scene(whole))) < 1e-3
    light.check_prompt("red cat")
    with pytest.raises(InputError, match="gave its text encoders away and kept 4 prompts; 'banana' is none of them"):
        light.encode(["banana"])
    with pytest.raises(InputError, match="a diffusers folder needs them"):
        light.merged()
    with pytest.raises(InputError, match="matches no parameter"):
        light.select("text_encoder")


def test_other_recomputation_is_refused_rather_than_wrong() -> None:
    model = load("tiny-unet")
    cond, state, _ = scene(model)
    model.unet.enable_gradient_checkpointing()
    student = learner(model, "full")
    with pytest.raises(InputError, match=r"forgets views; open it by load\(..., checkpointing=True\)"):
        student.view().predict(state, cond)
    with torch.no_grad():
        student.view().predict(state, cond)


@pytest.mark.parametrize("name", ["tiny-sd3", "tiny-flux-distilled"])
def test_joint_attention_is_whole_for_one_head_at_a_time(name: str) -> None:
    """Also for gradients; at FLUX' size the maps of all heads and blocks would be hundreds of GB."""
    model = load(name)
    cond, state, _ = scene(model)
    tap = Tap.of(model)
    learner(model, "low").view().view(hooks=tap.hooks).predict(state, cond)
    query = next(iter(tap.seen.values()))["query"]
    heads, rows = tap.heads, query.numel() // len(PROMPTS) // model.network["transformer"].inner_dim
    whole = {(len(PROMPTS), heads, rows, rows + cond.tokens.shape[1])}
    assert heads > 1
    with Watch() as control:
        attention(*tap._asking(next(iter(tap.seen.values())), ("query",))[:2])
    with Watch() as watch:
        tap.text_maps().square().sum().backward()
    assert whole <= set(control.shapes)
    assert not whole & set(watch.shapes)


@pytest.mark.parametrize("name", MODELS)
def test_what_was_listened_to_ends_with_its_tap(name: str) -> None:
    """Without the collector of circles, which does not know how much memory a circle holds."""
    model = load(name)
    cond, state, _ = scene(model)
    gc.collect()
    gc.disable()
    try:
        tap = CrossTap.of(model) if model.family == "unet" else Tap.of(model)
        model.view(hooks=tap.hooks).predict(state, cond)
        refs = [weakref.ref(tensor) for parts in tap.seen.values() for tensor in parts.values()]
        assert refs and all(ref() is not None for ref in refs)
        del tap
        assert all(ref() is None for ref in refs)
    finally:
        gc.enable()
