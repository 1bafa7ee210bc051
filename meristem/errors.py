"""Errors a user can act on: each says what is wrong, where, and what to do."""

from __future__ import annotations


class MeristemError(Exception):
    """A user's mistake or bad input. The command line prints it without a traceback.

    what: what is wrong and where; remedy: what to do about it (may be empty).
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}\n  {remedy}" if remedy else what)


class DataError(MeristemError):
    """A file cannot be used: unreadable, NaN, geometry missing, shapes that differ.

    `reason` is a short fixed word for counting (truncated, nan, no-affine, duplicate, shape, unreadable, …).
    """

    def __init__(self, reason: str, what: str, remedy: str = "") -> None:
        self.reason = reason
        super().__init__(what, remedy)

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str]]:
        return type(self), (self.reason, self.what, self.remedy)  # loader workers send it home


class RecipeError(MeristemError):
    """A recipe, or an override of one, is wrong: unknown key, impossible combination, missing view."""


class CheckpointError(MeristemError):
    """A checkpoint is missing, unreadable, or does not fit what it is loaded into."""
