"""The one error a user can cause."""

from collections.abc import Iterable


class InputError(ValueError):
    """A value given from outside that the library cannot use.

    Its message is one line with the offending value and the legal ones; the command line prints it and exits with 2.
    """


def unknown(what: str, value: object, legal: Iterable[str]) -> InputError:
    """Build the error for a name that is not in a list.

    Reads `unknown method 'usd'; legal: esd, uce`.
    """
    return InputError(f"unknown {what} {value!r}; legal: {', '.join(sorted(legal)) or 'none'}")
