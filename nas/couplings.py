"""Equations between sizes: which students keep them, and which sizes follow from others by them.

Of the sizes that an equation is about, those are given whose axes somebody gave options or a size of their own. One of the others may follow from them: query
heads from KV heads, say. Where none does, all are as they are, and the equation decides whether there is such a student.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from memory_budget.architecture import Architecture


class Coupling(Protocol):
    """An equation between sizes that a family insists on; its text says it. Sizes may be arrays: then everything is number by number."""

    fields: tuple[str, ...]  # of the architecture, that it is about

    def holds(self, student: Architecture, teacher: Architecture) -> Any:
        """Whether a student keeps it."""

    def follower(self, given: Collection[str]) -> str | None:
        """The field that follows from the others where these are given; None where none does."""

    def size(self, field: str, student: Architecture, teacher: Architecture) -> Any:
        """What a field that follows is, by the student's other sizes and the teacher's proportions; 0 where no size keeps the equation."""

    def unit(self, field: str, teacher: Architecture) -> int:
        """A field's sizes must be multiples of this where the other sizes are the teacher's, or follow; 1 for any."""


@dataclass(frozen=True, slots=True)
class Multiple:
    """What `field` of the architecture has must be a multiple of what `of` has, or no loader takes the model. Neither follows."""

    field: str
    of: str

    @property
    def fields(self) -> tuple[str, ...]:
        return self.field, self.of

    def holds(self, student: Architecture, _teacher: Architecture) -> Any:
        return getattr(student, self.field) % getattr(student, self.of) == 0

    def follower(self, _given: Collection[str]) -> str | None:
        return None

    def size(self, field: str, student: Architecture, _teacher: Architecture) -> Any:
        return getattr(student, field)

    def unit(self, field: str, teacher: Architecture) -> int:
        return getattr(teacher, self.of) if field == self.field else 1

    def __str__(self) -> str:
        return f"{self.field} % {self.of} == 0"


@dataclass(frozen=True, slots=True)
class QueryHeads:
    """KV heads have the same number of query heads each, as many as the teacher's or fewer; where only KV heads are given, just as many."""

    fields: tuple[str, ...] = ("num_attention_heads", "num_key_value_heads")

    def holds(self, student: Architecture, teacher: Architecture) -> Any:
        queries, keys = student.num_attention_heads, student.num_key_value_heads
        if not teacher.num_key_value_heads:
            return True
        return (queries % keys == 0) & (queries * teacher.num_key_value_heads <= keys * teacher.num_attention_heads)

    def follower(self, given: Collection[str]) -> str | None:
        return "num_attention_heads" if "num_key_value_heads" in given and "num_attention_heads" not in given else None

    def size(self, _field: str, student: Architecture, teacher: Architecture) -> Any:
        return student.num_key_value_heads * (teacher.num_attention_heads // teacher.num_key_value_heads) if teacher.num_key_value_heads else 0

    def unit(self, _field: str, _teacher: Architecture) -> int:
        return 1

    def __str__(self) -> str:
        return "num_attention_heads % num_key_value_heads == 0, each with as many as the teacher's or fewer"


QUERY_HEADS = QueryHeads()  # of every model with attention, whatever its family insists on besides


def following(couplings: Sequence[Coupling], given: Collection[str]) -> dict[str, Coupling]:
    """The fields that follow where the `given` ones are, each with its equation; one that follows from another that follows, behind it. Where two equations
    have a say, it is the family's."""
    known, found, rules = set(given), {}, (QUERY_HEADS, *couplings)
    while fields := {field: rule for rule in rules if (field := rule.follower(known)) is not None}:
        known, found = known | fields.keys(), found | fields
    return found


def completed(student: Architecture, teacher: Architecture, follows: Mapping[str, Coupling]) -> Architecture:
    """The student with what follows from its other sizes; 0 for what has no size that keeps its equation."""
    for field, coupling in follows.items():
        student = replace(student, **{field: coupling.size(field, student, teacher)})
    return student


def combined(teacher: Architecture, widths: Mapping[str, Sequence[int]], follows: Mapping[str, Coupling]) -> Architecture:
    """Every combination of options at once: the teacher with arrays, the options of a field along a dimension of their own, and with what follows."""
    import numpy as np  # only where there are candidates to weigh

    arrays = np.ix_(*(np.array(options, dtype=np.int64) for options in widths.values()))
    return completed(replace(teacher, **dict(zip(widths, arrays, strict=True))), teacher, follows)
