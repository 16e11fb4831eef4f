"""What the word MODEL|DIR points at: a model, a run folder, its artifact, or a folder of several runs."""

from dataclasses import dataclass
from pathlib import Path

from expunge.core.errors import InputError
from expunge.models._names import settled
from expunge.stages import _card


@dataclass(frozen=True)
class Place:
    """A model with the artifacts that go on it; `run` is the folder they were found in, None for a bare model."""

    model: str
    dtype: str
    run: Path | None
    artifacts: tuple[Path, ...]
    erased: tuple[tuple[str, ...], ...]
    """What each artifact erased."""

    @property
    def targets(self) -> tuple[str, ...]:
        """What any of the artifacts erased, each once."""
        return tuple(dict.fromkeys(name for names in self.erased for name in names))

    @property
    def one(self) -> Path | None:
        """The only artifact, None for a bare model; raises InputError if there are several."""
        if len(self.artifacts) > 1:
            names = ", ".join(str(path.parent) for path in self.artifacts)
            raise InputError(f"{self.run} holds {len(self.artifacts)} artifacts; name one of {names}")
        return self.artifacts[0] if self.artifacts else None


def place(word: str) -> Place:
    """Find out what a word points at; raises InputError for torn cards and for artifacts of different models."""
    path = Path(word)
    found = [path] if (path / "card.json").is_file() else sorted({*path.glob("artifact"), *path.glob("*/artifact")})
    artifacts = tuple(folder for folder in found if (folder / "card.json").is_file())
    if not artifacts:
        return Place(settled(word), "float32", None, (), ())
    cards = [_card.read(folder / "card.json") for folder in artifacts]
    bases = {(card.base.name, card.run.dtype) for card in cards}
    if len(bases) > 1:
        raise InputError(f"{path} holds artifacts of several models: {', '.join(sorted(name for name, _ in bases))}")
    (model, dtype), run = bases.pop(), path.parent if artifacts == (path,) else path
    return Place(model, dtype, run, artifacts, tuple(tuple(c.name for c in card.target) for card in cards))


def run_folder(path: Path) -> Path:
    """Return the run folder for itself or for its artifact folder."""
    return path.parent if (path / "card.json").is_file() else path
