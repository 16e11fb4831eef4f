"""What becomes of edits that follow one another, and whether their order matters."""

from jaxtyping import Float
from torch import Tensor

from expunge.patches.operator import SharedEdit


def commutator(first: SharedEdit, later: SharedEdit) -> float:
    """Give ||A B - B A||_F / ||A B - I||_F: 0 where the order of two edits does not matter.

    With A = I + X, B = I + Y it is X Y - Y X: exactly 0 where neither edit reads what the other writes, which is
    where duals of each are orthogonal to moves of the other; then A B = I + X + Y too. 0 also if nothing moves.
    """
    one, two = _change(first), _change(later)
    size = float((one + two + one @ two).norm())
    return float((one @ two - two @ one).norm()) / size if size > 0 else 0.0


def _change(edit: SharedEdit) -> Float[Tensor, "in in"]:
    return edit.moves.T @ edit.duals
