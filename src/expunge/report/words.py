"""The sentences of the page that do not depend on a run, and numbers as words."""

from expunge.core.records import Estimate

RATES = {
    "target_rate": "Target",
    "synonym_rate": "Synonyms",
    "retain_rate": "Neighbours",
    "style_rate": "Styles",
    "harmonic": "Harmonic mean",
}
MEANING = {
    "target_rate": "how often the concept is recognised when asked for by name; lower is better",
    "synonym_rate": "how often it is recognised when asked for by a synonym; lower is better",
    "retain_rate": "how often a retained neighbour is recognised when asked for; higher is better",
    "style_rate": "how often the asked style is the judge's first choice; higher is better",
    "harmonic": "harmonic mean of erased, retained and erased-by-synonym, MACE's H_o; higher is better",
}
WANTED_LOW = ("target_rate", "synonym_rate")

RECONSTRUCTION = (
    "Reconstruction. The full text of the paper and official code were not available to us. What ran here is our "
    "reading of its abstract; nothing on this page is the paper's result."
)

CREDITS = (
    "The model learned from, and so its pictures derive from, open emoji art, cropped and scaled to 64×64 pixels: "
    "Twemoji, copyright Twitter, Inc and other contributors, CC-BY 4.0; EmojiOne 2.3, Ranks.com and the EmojiTwo "
    "project, CC-BY 4.0; Fluent Emoji, copyright Microsoft Corporation, MIT; Noto Emoji, copyright Google LLC, "
    "Apache-2.0; by style also shaded, traced as line art, outlined or toned sepia. The file NOTICE of expunge has the "
    "details."
)

LIMITS = (
    (
        "A rate holds for these prompts",
        "It says how often a detector recognises the concept over this suite's prompts and seeds, with this sampler. "
        "It says nothing about paraphrases, other languages, adversarial prompts, edited latents or a model that is "
        "trained further. An erased concept can often be brought back by such means; see Attacks.",
    ),
    (
        "A detector is no eye",
        "It errs, and one trained on the generator's own kind of pictures may share its blind spots. Where its error "
        "is known it is removed, and that error's own uncertainty widens the interval. Concept evidence below a "
        "detector's threshold is not seen, so a rate of zero does not mean that no information about the concept is "
        "left.",
    ),
    (
        "Intervals count prompts, not pictures",
        "Pictures of one prompt resemble each other, so the bootstrap draws whole prompts. It describes other prompts "
        "of the same kind, not other kinds. Differences between methods whose intervals overlap should not be ranked.",
    ),
    (
        "One seed of the eraser",
        "Each method ran once, at the settings shown, on one model. Another seed, model or concept can reverse the "
        "order. Nothing here reproduces a published number.",
    ),
)


VERDICTS = {
    "leak": "From a picture alone one can tell better than by chance whether “{concept}” or “{anchor}” was asked for. "
    "At least this much of a fair coin is given away; 1 bit would be all of it. It need not be the concept that shows: "
    "see the row “made of the concept”.",
    "none": "None of these observers could tell whether “{concept}” or “{anchor}” was asked for. Had this share of the "
    "pictures shown the concept as the base model draws it, they would have noticed four times out of five. Less than "
    "that they would have missed.",
    "structural": "Whoever looks, with whatever means, learns no more than this, because a prompt that the gate "
    "catches is replaced by its twin before anything is drawn. It holds for prompts of this kind, and for users who "
    "cannot remove the gate.",
    "detector": "This one detector cannot tell more than this. Another detector, or a person, may.",
    "attack": "On a fresh prompt of the same kind, this attack within this budget succeeds no more often than this. "
    "Another attack, or a larger budget, may.",
    "invalid": "Nothing is claimed, because a control failed: {failed}.",
}
NOT_SAID = (
    (
        "“At least” is not “at most”",
        "Finding nothing proves nothing: no number of pictures can show that no observer will ever see more, since a "
        "picture can hide a message from everyone without the key. Only a bound that names its scope says “≤”.",
    ),
    (
        "These prompts and this sampler",
        "Other wordings, languages, images as prompts, edited latents and further training were not looked at, unless "
        "an attack is listed by name.",
    ),
    (
        "A difference is not a danger",
        "A model that always paints noise for the erased concept gives away a full bit and shows nothing of it. So "
        "three things are told apart: whether one can tell, whether it is made of the concept, whether it is shown.",
    ),
)


def per_cent(value: float) -> str:
    """Write a share with two significant digits and never as a power of ten: 0.031 %, 7.5 %, 130 %."""
    digits = f"{100 * value:.2g}"
    return f"{float(digits):.0f} %" if "e+" in digits else f"{digits} %"


def percent(value: float) -> str:
    """Write a rate as a percentage: whole above one, one decimal below it unless exactly nought."""
    share = 100 * value
    return f"{share:.1f}" if 0 < share < 1 or 99 < share < 100 else f"{share:.0f}"


def interval(estimate: Estimate) -> str:
    """Write an interval as `low–high` in per cent."""
    return f"{percent(estimate.low)}–{percent(estimate.high)}"


def size(count: int) -> str:
    """Write bytes in decimal units, as file managers do."""
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.0f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def span(seconds: float) -> str:
    """Write a duration in the unit a person would use."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def path(bits: float, ratio: float | None, *, vacuous: bool) -> str:
    """Say what a path row bounds, with the word vacuous where it is nothing, and its ratio to the base model's."""
    bound = "1 bit, vacuous" if vacuous else f"{bits:.2g} bit"
    share = "" if ratio is None else f"; divergence {ratio:.2g} of the base model's"
    return f"at most {bound}, estimated over these prompts{share}"


def listed(names: list[str]) -> str:
    """Join names as prose does: a, b and c."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def paper_link(paper: str) -> str:
    """Return the address of `arXiv:<id>` or a DOI; of several, with commas between, the first one's."""
    paper = paper.partition(",")[0]
    if paper.lower().startswith("arxiv:"):
        return f"https://arxiv.org/abs/{paper[6:]}"
    return f"https://doi.org/{paper.removeprefix('doi:')}"
