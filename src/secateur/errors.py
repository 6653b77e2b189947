"""What can go wrong, in sentences a colleague would write: what happened, where, what to do.

Every error that a user can put right is a `SecateurError`; the command line prints its message alone and
exits with code 2. Anything else that escapes is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """A problem that the user can put right; the message is the whole story."""


class UnknownName(SecateurError):
    """A name that is none of the choices; lists them, the nearest first.

    >>> raise UnknownName("criterion", "magnitud", ["random", "magnitude"])
    Traceback (most recent call last):
    secateur.errors.UnknownName: unknown criterion 'magnitud'; did you mean 'magnitude'? Choices: magnitude, random.
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str], hint: str = "") -> None:
        ordered = nearest(name, choices)
        close = difflib.get_close_matches(name, ordered, n=1, cutoff=0.6)
        meant = f"; did you mean {close[0]!r}?" if close else "."
        shown = ", ".join(ordered[:12]) + (f", and {len(ordered) - 12} more" if len(ordered) > 12 else "")
        listed = f" Choices: {shown}." if ordered else ""
        super().__init__(f"unknown {kind} {name!r}{meant}{listed}{' ' + hint if hint else ''}")
        self.kind, self.name, self.choices = kind, name, tuple(ordered)


class DataError(SecateurError):
    """Images or labels that cannot be read, or do not have the layout that was promised."""


class ModelError(SecateurError):
    """A model that cannot be built, or weights that do not fit it."""


class CaptureError(SecateurError):
    """The model did not run on the example inputs; names the module and the op."""


class PlanError(SecateurError):
    """A plan that cannot be made, or that does not belong to this model; nothing has been changed."""


class ProofError(SecateurError):
    """A cut model that does not compute what the plan promises."""


class TrainingError(SecateurError):
    """Training that cannot go on, such as a loss that is not finite; the last good checkpoint is kept."""


class RecipeError(SecateurError):
    """A recipe with a wrong key, type or range; names the file and the line."""


class RunError(SecateurError):
    """A run folder that exists, is missing or is unreadable."""


def nearest(name: str, choices: Iterable[str]) -> list[str]:
    """The choices, the most similar to `name` first, ties in alphabetical order.

    >>> nearest("resnet65", ["vgg16", "resnet56", "resnet20"])
    ['resnet56', 'resnet20', 'vgg16']
    """

    def distance(choice: str) -> tuple[float, str]:
        return (-difflib.SequenceMatcher(None, name.lower(), choice.lower()).ratio(), choice)

    return sorted(choices, key=distance)
