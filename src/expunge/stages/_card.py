"""A card from its file. Free of torch: commands read cards before they load anything."""

from pathlib import Path

from expunge.core.card import Card
from expunge.core.errors import InputError
from expunge.stages import _files


def read(file: Path) -> Card:
    """Read one card.json; raises InputError that names the file if it is missing, torn or of another schema."""
    try:
        return Card.from_json(_files.read_bytes(file).decode())
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: {error}") from None
