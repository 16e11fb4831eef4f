import pytest
import torch

from expunge.core.condition import Condition
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.measure import Detector, Samples
from expunge.core.records import Case, OperatingPoint
from expunge.ops.stats import clopper_pearson


def condition(b: int, pooled: bool = True) -> Condition:
    return Condition(
        tokens=torch.arange(b * 15, dtype=torch.float32).reshape(b, 5, 3),
        mask=torch.ones(b, 5, dtype=torch.bool),
        last=torch.arange(b) % 5,
        pooled=torch.rand(b, 2) if pooled else None,
        extra={"time_ids": torch.arange(b * 6.0).reshape(b, 6)},
    )


def test_subject_is_the_row_at_last():
    cond = condition(4)
    assert torch.equal(cond.subject, torch.stack([cond.tokens[i, cond.last[i]] for i in range(4)]))


@pytest.mark.parametrize("pooled", [True, False])
def test_cat_then_take_gives_the_parts_back(pooled):
    cond = condition(4, pooled)
    halves = [cond.take(torch.tensor([0, 1])), cond.take(torch.tensor([2, 3]))]
    whole = Condition.cat(halves)
    assert len(whole) == 4
    for field in ("tokens", "mask", "last"):
        assert torch.equal(getattr(whole, field), getattr(cond, field))
    assert torch.equal(whole.extra["time_ids"], cond.extra["time_ids"])
    assert (whole.pooled is None) is not pooled


def test_shapes_are_checked_under_test():
    with pytest.raises(Exception, match=r"jaxtyping|beartype|type"):
        Condition(tokens=torch.zeros(2, 5, 3), mask=torch.ones(3, 5, dtype=torch.bool), last=torch.zeros(2).long())


def test_random_streams_depend_on_seed_and_name_only():
    def draw(run: Run, *name: str | int) -> torch.Tensor:
        return torch.randn(8, generator=run.rng(*name))

    run = Run(seed=1)
    first = draw(run, "visit", 3)
    draw(run, "other")
    assert torch.equal(first, draw(run, "visit", 3))
    assert torch.equal(first, draw(Run(seed=1), "visit", 3))
    assert not torch.equal(first, draw(run, "visit", 4))
    assert not torch.equal(first, draw(Run(seed=2), "visit", 3))
    assert not torch.equal(draw(run, "a", "b"), draw(run, "ab"))


def test_weight_editing_methods_have_nothing_to_restore():
    class Idle(Eraser):
        def erase(self, model, request, run):
            raise AssertionError

    with pytest.raises(InputError, match="Idle leaves no guard"):
        Idle.restore({}, {})


class Brightness(Detector):
    def __init__(self, point: OperatingPoint | None) -> None:
        self.point = point

    def score(self, images, concept):
        return images.mean((1, 2, 3)) - 0.25

    def operating_point(self, concept):
        return self.point


def test_a_detector_fires_at_its_threshold_and_at_zero_without_one():
    from expunge.core.concept import Concept

    images = torch.tensor([0.2, 0.3, 0.75]).reshape(3, 1, 1, 1).expand(3, 3, 2, 2)
    rate = clopper_pearson(9, 10)
    point = OperatingPoint(threshold=0.5, sensitivity=rate, specificity=rate, n=20)
    assert Brightness(None).fires(images, Concept.of("light")).tolist() == [False, True, True]
    assert Brightness(point).fires(images, Concept.of("light")).tolist() == [False, False, True]


def test_samples_need_a_case_per_image():
    case = Case(case_id="a", target="t", role="target", concept="t", style="s", background="b", prompt="p", seed=0)
    assert len(Samples(torch.zeros(1, 3, 2, 2), (case,)).cases) == 1
    with pytest.raises(InputError, match="2 images for 1 cases"):
        Samples(torch.zeros(2, 3, 2, 2), (case,))
