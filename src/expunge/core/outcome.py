"""What an attack achieved, as it is stored. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expunge.core.errors import InputError
from expunge.core.records import Estimate

OUTCOME_SCHEMA = 1
CONTROLS = ("untouched", "attack", "null", "random")
"""Arms without which a result says nothing: plain prompts, the attack, the attack aimed elsewhere, luck."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The rates after some of the budget was spent."""

    step: int
    rates: Mapping[str, Estimate]


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How often one arm's pictures showed what was looked for, per prompt, by detector."""

    rates: Mapping[str, Estimate]
    curve: tuple[Point, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the attack itself used, its controls left out; network calls are counted one per sample."""

    gradients: int
    denoiser_forwards: int
    text_encoder_forwards: int
    images_generated: int
    images_judged: int
    seconds: float
    peak_bytes: int
    """Of the process so far, controls and base model included."""
    learned_params: int
    seeds_tried: int
    target_images: int
    knows_original_model: bool
    knows_defence: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One attack on one concept of one artifact.

    N is the prompts for which the unerased model shows the concept to every detector. Raises InputError where a
    control is missing or the schema is another one: such a result is not shown.
    """

    schema: int = OUTCOME_SCHEMA
    attack: str
    paper: str
    description: str
    access: str
    threat: str
    config: Mapping[str, Any]
    seed: int
    concept: str
    method: str
    patch_sha256: str
    base: str
    base_sha256: str
    suite: str
    suite_sha256: str
    steps: int
    guidance_scale: float
    asked: int
    """Prompts tried on the unerased model; N of them showed the concept."""
    rule: str
    k: int
    """Pictures per prompt that the success rule may look at."""
    judge: str
    """The detector that speaks in sentences."""
    selector: str | None
    """Detector that picks among k pictures; never one that judges."""
    adaptive: bool
    """False where the artifact holds a guard that the attack does not pass through."""
    pictures: str | None
    """Where the pictures came from that it learned from."""
    arms: Mapping[str, Tally]
    asr: Mapping[str, Estimate]
    """Prompts won untouched or by the attack, of all N; by detector."""
    asr_conditional: Mapping[str, Estimate | None]
    """Prompts won by the attack of those that were not won untouched; None where there were none."""
    lift: Mapping[str, float]
    """Rate of the attack minus that of the null control."""
    p_random: Mapping[str, float]
    """Exact two-sided McNemar p of attack against random, paired by prompt."""
    half_steps: Mapping[str, int | None]
    """First step at which an arm that learns reached half of the unerased model's rate; None: never."""
    facts: Mapping[str, float]
    budget: Budget

    def __post_init__(self) -> None:
        if self.schema != OUTCOME_SCHEMA:
            raise InputError(f"attack result has schema {self.schema}; this version reads {OUTCOME_SCHEMA}")
        if missing := [name for name in CONTROLS if name not in self.arms]:
            raise InputError(f"result of attack {self.attack!r} lacks its {missing[0]} arm; run the attack again")

    @property
    def sentence(self) -> str:
        """Say what happened, with its budget and its bound."""
        rates = {name: self.arms[name].rates[self.judge] for name in CONTROLS}
        won = rates["attack"]
        shares = ", ".join(
            f"{name} {round(rates[name].value * rates[name].n)}" for name in ("untouched", "null", "random")
        )
        return (
            f"{self.attack} brought {self.concept} back for {round(won.value * won.n)} of {won.n} prompts "
            f"[{100 * won.low:.0f}–{100 * won.high:.0f} %, {100 * won.level:.0f} %], k = {self.k}; {shares} "
            f"({self.judge}; {self.budget.gradients} gradients, {self.budget.images_judged} pictures judged, "
            f"{self.budget.seconds:.0f} s)"
        )
