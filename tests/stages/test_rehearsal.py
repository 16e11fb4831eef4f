"""The account of a rehearsal, against sums done by hand."""

import torch
from torch import nn

from expunge.stages._rehearsal import Rehearsal

MB = 2**20


def rehearsed(network=None):
    return Rehearsal(network if network is not None else nn.Identity())


def matrix(rows=512, columns=512):
    return torch.empty(rows, columns, device="meta")  # 1 MB in float32


def test_what_is_dropped_counts_no_longer():
    account = rehearsed()
    with account.running():
        a = matrix()
        b = a + 1
        del b
        c = a.double()
        view = c.T[:3]
        del c
        assert account.held == 3 * MB  # the view keeps the whole storage
        del view
        assert account.held == MB
    assert account.peak.total == account.peak.rest == 3 * MB
    account.restart()
    assert account.peak.rest == MB and account.peak.kept == 2 * MB  # small blocks stay with the allocator
    assert account.beside(MB, 2) == 3 * MB and account.beside(40 * MB) == 43 * MB


def test_large_blocks_are_given_back():
    account = rehearsed()
    with account.running():
        a = matrix(512 * 40)
        del a
        b = matrix(512 * 33)
    assert b.is_meta and account.peak.total == 40 * MB and account.beside(0) == 33 * MB


def test_a_backward_pass_holds_what_autograd_saves():
    """y = sum of sin(x)²: x for cos, sin(x) for the power; then gradients arrive while those are freed."""
    account = rehearsed()
    with account.running():
        x = matrix().requires_grad_()
        y = x.sin().square()
        assert account.held == 3 * MB
        total = y.sum()
        del y
        assert account.held - 2 * MB < 100  # x and sin(x)
        total.backward()
        del total
        assert account.held == 2 * MB and x.grad is not None


def test_training_by_kind():
    network = nn.Linear(512, 512, bias=False, device="meta").requires_grad_(False)
    account = rehearsed(network)
    with account.running():
        master = network.weight.detach().to(torch.float32, copy=True).requires_grad_()
        adam = torch.optim.Adam([master])
        for _ in range(2):
            adam.zero_grad(set_to_none=True)
            (matrix(64) @ master).sum().backward()
            adam.step()
    peak = account.peak
    assert (peak.weights, peak.trainable, peak.optimizer) == (MB, MB, 2 * MB)
    assert peak.gradients == MB and 0 < peak.rest <= 2 * MB + 1024
    assert peak.total == peak.weights + peak.trainable + peak.gradients + peak.optimizer + peak.rest


def test_attention_maps_are_never_whole():
    account = rehearsed()
    with account.running():
        q, k, v = (torch.empty(1, 8, 4096, 64, device="meta", requires_grad=True) for _ in range(3))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        out.sum().backward()
    assert out.shape == q.shape and q.grad is not None
    assert account.peak.total < 10 * 8 * MB  # each of q, k, v is 8 MB; one map would be 512 MB


def test_small_things_keep_their_numbers():
    account = rehearsed()
    with account.running():
        mask = torch.tensor([[True, False, True]]).to("meta")
        last = mask.sum(1) - 1
        rows = matrix(3)
        assert int(last[0]) == 1 and rows[mask[0]].shape == (2, 512) and not account.guessed
        level = torch.linspace(0, 1, 5).to("meta")
        assert level[2].item() == 0.5
        rows[mask[0]] = 0.0
        assert rows.is_meta and (rows * level[3]).is_meta


def test_what_is_asked_of_numbers_is_answered():
    account = rehearsed()
    with account.running():
        a = matrix(4)
        assert bool(a.any()) and float(a.norm()) == 1.0 and torch.equal(a, a) and not torch.equal(a, a + 1)
        unique, where = torch.unique(a, dim=0, return_inverse=True)
        assert unique.shape == a.shape and where.shape == (4,)
        assert a[a[:, 0] > 0].shape == a.shape
        assert not account.guessed
        assert int((a > 0).sum()) == 1 and account.guessed
        assert a.cpu().is_meta


def test_outside_the_block_nothing_is_changed():
    account = rehearsed()
    with account.running():
        pass
    assert torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 2, 2)).shape == (1, 1, 2, 2)
    assert torch.ones(3).tolist() == [1, 1, 1] and account.held == 0
