"""Soft words: rows of the text encoders' input embeddings that stand for a word, seen through a view's hooks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from expunge.core.errors import InputError
from expunge.core.generator import Generator, Hook

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """One text encoder's place for a word: its embedding layer, and the ids that the word is tokenized to."""

    path: str
    ids: Ids
    table: Float[Tensor, "v d"]


def slots(model: Generator, word: str) -> tuple[Slot, ...]:
    """Find where every text encoder of a model reads a word; raises InputError for a model without any."""
    found = []
    for path, table in _layers(model):
        spoken, silent = (_ids(model, path, text) for text in (word, ""))
        own = _without(spoken, silent)
        if not own:
            raise InputError(f"word {word!r} has no token of its own in {path} of {model.name!r}; choose another")
        found.append(Slot(path, tuple(own), model.weight(table).detach()))
    if not found:
        raise InputError(f"{model.name!r} of family {model.family!r} has no text encoder with an embedding table")
    return tuple(found)


def with_word(model: Generator, places: Sequence[Slot], rows: Sequence[Float[Tensor, "_ _"]]) -> Generator:
    """Give the model with the rows in place of the word's own; differentiable in them, nothing else changes."""
    return model.view(hooks=[Hook(slot.path, _put(slot.ids, row)) for slot, row in zip(places, rows, strict=True)])


def absent(model: Generator, places: Sequence[Slot], texts: Sequence[str], word: str) -> None:
    """Raise InputError if a text already holds a token of the word: it would be replaced there too."""
    for slot in places:
        for text in dict.fromkeys(texts):
            if set(_ids(model, slot.path, text)) & set(slot.ids):
                raise InputError(
                    f"text {text!r} holds a token of {word!r}, which must stand for nothing; choose another"
                )


def _put(ids: Ids, rows: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
    def put(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        for token, row in zip(ids, rows, strict=True):
            output = torch.where((inputs[0] == token)[..., None], row.to(output), output)
        return output

    return put


def _layers(model: Generator) -> list[tuple[str, str]]:
    """Module of the token embedding that every text encoder really asks, and the path of its weights.

    T5 ties two modules to one table, of which one is asked.
    """
    found = []
    for part, encoder in model.network.named_children():
        if part.startswith("text_encoder"):
            table: Any = encoder.get_input_embeddings().weight  # type: ignore[operator]
            named = next(name for name, weight in encoder.named_parameters() if weight is table)
            tied = [name for name, module in encoder.named_modules() if getattr(module, "weight", None) is table]
            found += [(f"{part}.{name}", f"{part}.{named}") for name in tied if _heard(model, f"{part}.{name}", "")]
    return found


def _ids(model: Generator, path: str, text: str) -> list[int]:
    return _heard(model, path, text)[0][0].tolist()


def _heard(model: Generator, path: str, text: str) -> list[Int[Tensor, "b l"]]:
    """What an embedding layer is asked for while a text is encoded."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen.append(inputs[0])

    with torch.no_grad():
        model.view(hooks=[Hook(path, keep)]).encode([text])
    return seen


def _without(ids: list[int], others: list[int]) -> list[int]:
    """Ids of the first list that the second lacks, each once, in order: opening, closing and padding are in both."""
    return list(dict.fromkeys(token for token in ids if token not in others))
