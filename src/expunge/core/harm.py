"""What no attack is ever run on, whoever asks. Free of torch."""

import re
from collections.abc import Sequence

from expunge.core.concept import Concept
from expunge.core.errors import InputError

_SEXUAL = re.compile(
    r"\b(nudes?|nudity|nudist|naked|topless|undress\w*|unclothed|sex\w*|erotic\w*|porn\w*|nsfw|explicit|lewd|fetish\w*"
    r"|genital\w*|breasts?|lingerie)\b"
)
_MINOR = re.compile(
    r"\b(child(ren|ish)?|kids?|minors?|boys?|girls?|teen(s|ager|agers|age)?|bab(y|ies)|toddlers?|infants?|underaged?"
    r"|preteens?|school(boy|girl|child)\w*|juveniles?|daughters?|sons?|young(er|est)?|little|lolis?|shotas?)\b"
)


def refuse_harm(concept: Concept, prompts: Sequence[str] = ()) -> None:
    """Raise InputError where a text to be brought back joins a sexual concept with anything about minors.

    All phrases are looked at together; a concept of kind "explicit" counts as sexual. There is no way around it. It
    would rather refuse a harmless text than let one through.
    """
    text = " ".join((concept.name, *concept.prompts, *prompts)).casefold()
    if (concept.kind == "explicit" or _SEXUAL.search(text)) and _MINOR.search(text):
        raise InputError("no attack is run on texts that join a sexual concept with minors; there is no override")
