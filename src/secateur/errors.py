"""Every error that a user can cause. The command line prints it and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of all errors caused by input: the message names the field, the value and the remedy."""


class RecipeError(SecateurError):
    """A recipe asks for something that does not exist or cannot be."""


class DataError(SecateurError):
    """A data set is missing, unreadable, or not what its checksum says."""


class NonFiniteError(SecateurError):
    """A weight tensor holds NaN or infinity, so it has no nearest member of any set."""


class MembershipError(SecateurError):
    """A tensor that should be encoded is not a member of its constraint set."""


class ArtifactError(SecateurError):
    """A packed file is truncated, damaged, hostile, or of an unknown version or architecture."""


class ParityError(SecateurError):
    """An artifact does not compute what the trained model computes."""


class ChannelError(SecateurError):
    """A network cannot be traced, or a compaction plan does not fit it."""


class BusyError(SecateurError):
    """Other programs use so much of the machine that nothing can be measured."""


class MissingDependencyError(SecateurError):
    """An optional package is needed for what was asked; the message gives the install command."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
