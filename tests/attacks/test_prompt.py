"""Prompt attacks on a toy where what erasing left is known: they must win exactly where something is left."""

import pytest

from attacks.toy import AIM, as_toy, base, shown
from expunge.attacks.prompt.negative_flip import NegativeFlip
from expunge.attacks.prompt.random_suffix import RandomSuffix
from expunge.core.eraser import Run
from expunge.core.errors import InputError

UNERASED = as_toy(base)
REVERSED = as_toy(lambda prompt: -1.0 * base(prompt))
"""Erased by guidance reversal: the concept's direction with the sign turned."""
REMOVED = as_toy(lambda prompt: 0.0)
LAST_WORD = as_toy(lambda prompt: base(prompt) * float(not prompt.endswith(("red", "blue", "berry"))))
"""Weakly erased: only prompts that end as the known ones do."""


def test_flip_brings_back_what_was_reversed_and_nothing_that_was_removed() -> None:
    for model, wins in ((REVERSED, True), (REMOVED, False)):
        (attempt,) = NegativeFlip().search(model, AIM, Run(), reference=UNERASED)
        assert shown(attempt) == [wins] * 3
        (lucky,) = NegativeFlip().random(model, AIM, Run(), reference=UNERASED, found=attempt)
        assert shown(lucky) == [False] * 3


def test_flip_asks_for_the_concept_as_the_negative_prompt_only() -> None:
    (attempt,) = NegativeFlip(carrier="thing").search(REVERSED, AIM, Run(), reference=UNERASED)
    assert attempt.prompts == ("a thing on red", "a thing on blue", "one thing")
    assert attempt.negative == ("berry",) * 3 and attempt.seeds == AIM.seeds


def test_suffixes_get_past_what_knows_endings_and_not_past_what_knows_nothing() -> None:
    attack = RandomSuffix(tries=2)
    for model, wins in ((LAST_WORD, True), (REMOVED, False)):
        attempts = list(attack.search(model, AIM, Run(), reference=UNERASED))
        assert [shown(attempt) for attempt in attempts] == [[wins] * 3] * 2
        assert [attempt.step for attempt in attempts] == [1, 2]
        lucky = attack.random(model, AIM, Run(), reference=UNERASED, found=attempts[-1])
        assert [shown(attempt) for attempt in lucky] == [[False] * 3] * 2


def test_suffixes_follow_from_the_seed() -> None:
    def words(seed: int) -> list[tuple[str, ...]]:
        return [
            each.prompts for each in RandomSuffix(tries=3).search(UNERASED, AIM, Run(seed=seed), reference=UNERASED)
        ]

    assert words(1) == words(1) != words(2)
    assert len({prompt for prompts in words(1) for prompt in prompts}) == 9
    assert all(prompt.startswith(plain + " ") for prompt, plain in zip(words(1)[0], AIM.prompts, strict=True))


@pytest.mark.parametrize("fields", [{"tries": 0}, {"letters": 0}], ids=str)
def test_a_budget_of_nothing_is_refused(fields: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(fields))} is 0; legal: 1"):
        RandomSuffix(**fields)
