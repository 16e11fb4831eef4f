"""What the independence game may claim, and the toy in which it reaches its end."""

import math

import pytest
import torch
from torch import Tensor

from expunge.core.errors import InputError
from expunge.models.load import load
from expunge.ops.independence import Discriminator, Opponent, confusion, flipped, information, telling
from expunge.ops.saliency import most_salient, saliency
from expunge.ops.student import Student

LN2 = math.log(2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def jsd(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence of two discrete laws in nats: I(C; X) for a balanced C."""
    middle = (p + q) / 2
    return float(0.5 * (torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)).nansum())


def expected(logit: Tensor, p: Tensor, q: Tensor) -> float:
    """The balanced cross-entropy of a discriminator on two discrete laws."""
    return float(0.5 * (p * torch.nn.functional.softplus(-logit) + q * torch.nn.functional.softplus(logit)).sum())


def test_confusion_is_stationary_at_a_fair_coin_and_convex_and_the_flipped_form_is_not():
    logit = torch.linspace(-4, 4, 81, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(confusion(logit).sum(), logit, create_graph=True)
    assert confusion(torch.zeros(1)).item() == pytest.approx(LN2)
    assert slope[40].item() == pytest.approx(0.0, abs=1e-12)
    assert (torch.autograd.grad(slope.sum(), logit)[0] > 0).all()
    assert torch.equal(confusion(logit), confusion(-logit))
    (steep,) = torch.autograd.grad(flipped(logit).sum(), logit)
    torch.testing.assert_close(steep, logit.sigmoid())
    assert steep[40].item() == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(5))
def test_a_discriminator_proves_information_from_below_and_bayes_proves_all_of_it(seed):
    p, q = torch.rand(2, 7, generator=seeded(seed), dtype=torch.float64).softmax(1)
    truth = jsd(p, q)
    assert information(expected((p / q).log(), p, q)) == pytest.approx(truth, abs=1e-12)
    guess = torch.randn(7, generator=seeded(seed + 50), dtype=torch.float64)
    gap = expected(guess, p, q) - expected((p / q).log(), p, q)
    assert gap >= 0
    assert information(expected(guess, p, q)) <= truth
    # ln 2 - loss is no upper bound: the gap is what is missing
    assert LN2 - expected(guess, p, q) + gap == pytest.approx(truth)
    distance = float((p - q).abs().sum() / 2)
    assert (1 + distance) / 2 <= (1 + min(1.0, math.sqrt(2 * truth))) / 2 + 1e-12


def test_what_is_proved_never_grows_when_the_sample_is_processed():
    for seed in range(5):
        p, q = torch.rand(2, 6, generator=seeded(seed), dtype=torch.float64).softmax(1)
        channel = torch.rand(6, 4, generator=seeded(seed + 9), dtype=torch.float64).softmax(1)
        seen = (p @ channel, q @ channel)
        bayes = (seen[0] / seen[1]).log()
        assert information(expected(bayes, *seen)) <= jsd(p, q)


def test_two_gaussians_are_measured_as_far_apart_as_they_are():
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    noise, found = torch.randn(40_000, generator=seeded(), dtype=torch.float64), []
    for mu in (0.0, 0.5, 1.0, 2.0):
        p, q = (torch.exp(-((grid - shift) ** 2) / 2) for shift in (mu, -mu))
        truth = jsd(p / p.sum(), q / q.sum())
        found.append(information(telling(2 * mu * (noise + mu), 2 * mu * (noise - mu)).item()))
        assert found[-1] == pytest.approx(truth, abs=0.01)
    assert found[0] == 0
    assert found == sorted(found)
    # an overconfident judge of identical samples proves nothing, and is not credited with less than nothing
    assert information(telling(3 * noise, 3 * noise).item()) == 0


def test_each_player_moves_only_itself():
    opponent = Opponent(Discriminator(4, 8, 2, seeded()), lr=1e-2, r1=0.1)
    asked = torch.randn(6, 4, 8, 8, generator=seeded(1), requires_grad=True)
    t, head = torch.full((6,), 0.5), torch.tensor([0, 1, 0, 1, 0, 1])
    before = {name: p.clone() for name, p in opponent.net.state_dict().items()}
    opponent.learn(asked, asked.detach() + 1, t, head)
    assert asked.grad is None
    moved = opponent.net.state_dict()
    assert any(not torch.equal(before[name], moved[name]) for name in before)
    kept = {name: p.clone() for name, p in moved.items()}
    confusion(opponent.logit(asked, t, head)).sum().backward()
    assert asked.grad is not None
    assert asked.grad.abs().sum() > 0
    assert all(p.grad is None or not p.grad.abs().any() for p in opponent.net.parameters()) or not any(
        p.requires_grad for p in opponent.net.parameters()
    )
    assert all(torch.equal(kept[name], p) for name, p in opponent.net.state_dict().items())


def test_a_head_learns_from_its_own_concept_only():
    opponent = Opponent(Discriminator(4, 8, 3, seeded()), lr=1e-2, r1=0.0)
    before = opponent.net.heads.weight.clone()
    opponent.learn(*torch.randn(2, 4, 4, 8, 8, generator=seeded(1)), torch.full((4,), 0.5), torch.ones(4).long())
    changed = (opponent.net.heads.weight != before).any(1)
    assert changed.tolist() == [False, True, False]


def accuracy(asked: Tensor, twin: Tensor, seed: int) -> float:
    """Accuracy of a discriminator that starts afresh and learns from half of the pairs, on the other half."""
    fresh = Opponent(Discriminator(2, 4, 1, seeded(seed)), lr=3e-3, r1=0.0)
    half = len(asked) // 2
    t, head = torch.full((half,), 0.3), torch.zeros(half).long()
    for _ in range(40):
        fresh.learn(asked[:half], twin[:half], t, head)
    logits = [fresh.logit(side[half:], t, head) for side in (asked, twin)]
    return float(torch.cat([logits[0] > 0, logits[1] <= 0]).float().mean())


@pytest.mark.parametrize("form", [confusion, flipped])
def test_the_toy_game_ends_where_nothing_can_be_told_and_leaves_the_rest(form):
    """Generator: x = shift + noise, its twin x = noise; the retained output reads another weight under a penalty."""
    rng = seeded(3)
    shift = torch.full((2, 1, 1), 1.5, requires_grad=True)
    rest = torch.zeros(2, 1, 1, requires_grad=True)
    opponent = Opponent(Discriminator(2, 4, 1, seeded(1)), lr=3e-3, r1=0.1)
    optimizer = torch.optim.Adam([shift, rest], lr=2e-2)
    t, head = torch.full((64,), 0.3), torch.zeros(64).long()
    noise, twin = torch.randn(2, 4000, 2, 4, 4, generator=seeded(4))  # 2000 pairs are held out
    assert accuracy(noise[:800] + shift.detach(), twin[:800], 8) > 0.95
    assert accuracy(noise + 0.15, twin, 8) > 0.55  # a game that stops at a tenth of the way is found out
    for _ in range(500):
        asked = torch.randn(64, 2, 4, 4, generator=rng) + shift + 0.1 * rest
        opponent.learn(asked, torch.randn(64, 2, 4, 4, generator=rng), t, head)
        optimizer.zero_grad()
        (form(opponent.logit(asked, t, head)).mean() + 10 * rest.square().mean()).backward()
        optimizer.step()
    assert rest.abs().max() < 0.05
    if form is confusion:  # the flipped form need not stop at the twin: that is why it is not the default
        assert shift.abs().max() < 0.05
        assert 0.45 <= accuracy(noise + shift.detach(), twin, 9) <= 0.55


def test_a_discriminator_that_has_not_learned_proves_nothing_either_so_that_its_loss_ends_no_game():
    noise, twin = torch.randn(2, 800, 2, 4, 4, generator=seeded(4))
    fresh = Opponent(Discriminator(2, 4, 1, seeded(8)), lr=3e-3, r1=0.0)
    t, head = torch.full((800,), 0.3), torch.zeros(800).long()
    assert information(fresh.learn(noise + 1.5, twin, t, head)) < 0.02
    assert accuracy(noise + 1.5, twin, 8) > 0.95


@pytest.mark.parametrize("draws", [1, 6])
def test_saliency_is_the_gradient_of_a_linear_model_done_by_hand(draws):
    """½ (w · x − y)² has the gradient (w · x − y) x."""
    x, y = torch.randn(draws, 5, generator=seeded()), torch.randn(draws, generator=seeded(1))
    w, other = torch.randn(5, generator=seeded(2)).requires_grad_(), torch.zeros(3, requires_grad=True)
    student = Student(load("tiny-unet"), {"w": w, "other": other})
    by_hand = (x @ w.detach() - y)[:, None] * x

    def loss(draw: int) -> Tensor:
        return 0.5 * (w @ x[draw] - y[draw]).square()

    mean, fisher = (saliency(student, loss, draws, kind) for kind in ("gradient", "fisher"))
    torch.testing.assert_close(mean[0], by_hand.mean(0).abs())
    torch.testing.assert_close(fisher[0], by_hand.square().mean(0))
    assert not mean[1].any() and not fisher[1].any()
    # over several draws signs cancel in one and not in the other: they are different orders
    assert torch.allclose(fisher[0], mean[0].square()) == (draws == 1)


def test_the_mask_keeps_exactly_the_largest_share_of_all_scalars_together():
    scores = [torch.rand(5, 7, generator=seeded()), torch.rand(11, generator=seeded(1)) + 0.5]
    for share in (0.1, 0.5, 0.93, 1.0):
        masks = most_salient(scores, share)
        kept, dropped = (
            torch.cat([s[m == wanted] for s, m in zip(scores, masks, strict=True)]) for wanted in (True, False)
        )
        assert len(kept) == round(share * 46)
        if len(dropped):
            assert kept.min() >= dropped.max()
    again = most_salient([3 * s for s in scores], 0.5)
    assert all(torch.equal(a, b) for a, b in zip(again, most_salient(scores, 0.5), strict=True))
    assert sum(int(m.sum()) for m in most_salient([torch.ones(10)], 0.3)) == 3
    for share in (0.0, 1e-6, 1.5, -0.2):
        with pytest.raises(InputError, match=f"share is {share}"):
            most_salient(scores, share)
