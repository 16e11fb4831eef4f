"""S-certificate: a guard that replaces the whole conditioning of what it catches leaks only through what it misses.

Source: certificates.md, section 6, with its formula corrected: see `Substitution`.
"""

from dataclasses import dataclass

from expunge.core.errors import InputError
from expunge.leakage.lower import most_rate


@dataclass(frozen=True)
class Substitution:
    """A gate's misses among n prompts, and whether caught prompts were seen to equal their twins bit for bit.

    I(C; X) <= m bits for every observer, m = P(miss | C = 1). Proof: both arms draw the same sentence p; Z says whether
    the gate misses p's concept form, so I(C; Z) = 0. Given Z = 0 both arms have one law, so I(C; X) <= I(C; X, Z) =
    P(Z = 1) I(C; X | Z = 1) <= m. The smaller h2(m / 2) - h2(m) / 2 of the source needs caught and missed prompts to
    share one law of twins; where they differ in topic it is violated (a test shows it), so it is not used.

    Raises InputError for a count that is none, and where an output of a caught prompt differed from its twin's: then
    the structure the bound rests on is absent.
    """

    misses: int
    n: int
    bitwise_ok: bool

    def __post_init__(self) -> None:
        if not 0 <= self.misses <= self.n or self.n < 1:
            raise InputError(f"{self.misses} misses of {self.n} prompts is not a count")
        if not self.bitwise_ok:
            raise InputError("a caught prompt and its twin differ: without exact substitution there is no such bound")

    def most_bits(self, delta: float) -> float:
        """Upper bound in bits for all observers: the upper end of the miss rate, wrong with probability <= delta."""
        return most_rate(self.misses, self.n, delta)
