"""Prompts encoded once, for models whose text encoders are gone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from expunge.core.condition import Condition
from expunge.core.errors import InputError

SHOWN = 5  # prompts named in an error


class Reader(Protocol):
    """What a model asks in place of its text encoders."""

    def encode(self, prompts: Sequence[str], name: str) -> Condition:
        """Encode prompts for the model of a name."""
        ...


@dataclass(frozen=True)
class Texts:
    """A table of encoded prompts."""

    rows: Mapping[str, int]
    cond: Condition

    def encode(self, prompts: Sequence[str], name: str) -> Condition:
        """Look prompts up; raises InputError for one that is not in the table."""
        lost = [text for text in prompts if text not in self.rows]
        if lost:
            known = ", ".join(repr(text) for text in list(self.rows)[:SHOWN])
            raise InputError(
                f"{name!r} gave its text encoders away and kept {len(self.rows)} prompts; {lost[0]!r} is none of them "
                f"({known}{', …' if len(self.rows) > SHOWN else ''})"
            )
        return self.cond.take(torch.tensor([self.rows[text] for text in prompts], device=self.cond.tokens.device))


class Gone(nn.Module):
    """Where a text encoder was: its configuration, and nothing else."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
