"""What text-reading layers make of embedding rows, before and after an edit. Everything in float64.

Rows are embeddings ("n in"), a layer W is "out in" and gives W k for a row k; the primed ones are the edited layers.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from expunge.core.concept import Request
from expunge.core.generator import Generator
from expunge.core.measure import Edit, Reading
from expunge.ops.inversion import CUT, undoing
from expunge.ops.ridge import output_gram, sum_products
from expunge.ops.rows import prompt_rows, row_pairs

# An edit is W M with one M where it is so to this share of its size: float32 weights leave about 1e-5.
_SHARED = 1e-3


def edit_between(base: Generator, erased: Generator, request: Request) -> Edit:
    """Compare every parameter of two models bit by bit, and gather what text-reading layers see of a request."""
    paths = [name for name, _ in base.network.named_parameters()]
    changed = tuple(path for path in paths if not torch.equal(base.weight(path), erased.weight(path)))
    return Edit(request, changed, len(paths), tuple(_readings(base, erased, request, set(changed))))


def _readings(base: Generator, erased: Generator, request: Request, changed: set[str]) -> Iterator[Reading]:
    old, new = ({site.path: site for site in model.sites("text_in")} for model in (base, erased))
    if not changed or not changed <= old.keys():
        return
    target, anchor = (base.encode(side) for side in zip(*request.pairs, strict=True))
    kept = base.encode(["", *(prompt for concept in request.retain for prompt in concept.prompts)])
    for route in sorted({old[path].reads for path in changed}):
        paths = [path for path in old if old[path].reads == route]
        yield Reading(
            old=tuple(old[path].weight for path in paths),
            new=tuple(new[path].weight for path in paths),
            targets=tuple((c.double(), a.double()) for c, a in row_pairs(target, anchor, route, "tail")),
            kept=tuple(rows.double() for rows in prompt_rows(kept, route, "window")),
        )


def residuals(reading: Reading) -> Iterator[float]:
    """Give ||W' c - W a|| / ||W c - W a|| for every layer and target prompt, over its rows together.

    Prompts that a layer reads as their anchor are left out.
    """
    for old, new in layers(reading):
        for rows, anchor in reading.targets:
            apart = ((rows - anchor) @ old.T).norm()
            if apart > 0:
                yield float((rows @ new.T - anchor @ old.T).norm() / apart)


def drifts(reading: Reading) -> Iterator[float]:
    """Give ||W' p - W p|| / ||W p|| for every layer and retained prompt, over its rows together.

    Prompts that a layer reads as nothing are left out: SDXL's empty one.
    """
    for old, new in layers(reading):
        for rows in reading.kept:
            size = (rows @ old.T).norm()
            if size > 0:
                yield float((rows @ (new - old).T).norm() / size)


def off_target(reading: Reading) -> Iterator[float]:
    """Give ||(W' - W) (I - Q Q^T)||_2 / ||W||_2 for every layer, Q an orthonormal basis of all target rows."""
    rows = torch.cat([rows for rows, _ in reading.targets])
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    q = basis[values > CUT**0.5 * values[0]]
    for old, new in layers(reading):
        change = new - old
        yield float(_spectral(change - (change @ q.T) @ q) / _spectral(old))


def _spectral(matrix: Float[Tensor, "out in"]) -> float:
    """Largest singular value, by the smaller Gram matrix: thin layers of wide models are cheap."""
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())


def inversions(reading: Reading) -> Iterator[tuple[float, float]]:
    """Give for every target prompt how near any embeddings come to its old outputs, and how long the nearest are.

    First the square root of min_e sum_l ||W'_l e - W_l c||^2 / sum_l ||W_l c - W_l a||^2 over all its rows c: 0 where
    free embeddings undo the edit. Then ||e|| / ||c|| of the smallest such e. Source: closed-form inversion of keys and
    values, `undoing`.
    """
    back = undoing(reading.old, reading.new)
    for rows, anchor in reading.targets:
        found = rows @ back.T
        miss, apart = 0.0, 0.0
        for old, new in layers(reading):
            miss += float((found @ new.T - rows @ old.T).square().sum())
            apart += float(((rows - anchor) @ old.T).square().sum())
        if apart > 0:
            yield (miss / apart) ** 0.5, float(found.norm() / rows.norm())


def shared_matrix(reading: Reading) -> Float[Tensor, "k in"] | None:
    """Give V^T M of the M with W' = W M for all layers, V ("in k") a basis of what they hear; None without such an M.

    Of an M only V^T M is heard: V^T M e = V^T c is all an embedding e needs to be taken for c. Where the layers are
    taller than wide V is square, and V^T M has M's singular values.
    """
    values, vectors = torch.linalg.eigh(output_gram(reading.old))
    heard = vectors[:, values > CUT * values[-1]]
    m = (heard / values[values > CUT * values[-1]]).T @ sum_products(reading.old, reading.new)
    miss = sum(float(((old @ heard) @ m - new).square().sum()) for old, new in layers(reading))
    size = sum(float((new - old).square().sum()) for old, new in layers(reading))
    return m if miss <= _SHARED**2 * size else None


def layers(reading: Reading) -> Iterator[tuple[Float[Tensor, "out in"], Float[Tensor, "out in"]]]:
    """Give every layer before and after in float64, one at a time: all of them at once may not fit."""
    for old, new in zip(reading.old, reading.new, strict=True):
        yield old.double(), new.double()
