"""How papers' methods are chosen and built by name: the pairs that each paper has, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

from kdlab.config import Modality
from kdlab.distill.method import Method

SWITCH = ("on", "off")
"""Values of an option that is True or False in Python."""
NONE = "none"
"""The value that stands for no value, of an option that takes several."""


@dataclass(frozen=True)
class Option:
    """One setting of how a method is built, beside its weights and quirks.

    Attributes:
        name: of the builder's argument.
        values: known words.
        default: what it is where left out.
        what: one sentence.
        several: whether it takes several words, with commas between them; "none" for none at all.
    """

    name: str
    values: tuple[str, ...]
    default: str
    what: str
    several: bool = False

    def read(self, text: str) -> str | bool | tuple[str, ...]:
        """The builder's value.

        Raises:
            ValueError: a word that is not known; the message lists the known ones.
        """
        words = [word.strip() for word in text.split(",")] if self.several and text != NONE else [text]
        for word in words if text != NONE or not self.several else ():
            if word not in self.values:
                known = ", ".join(self.values) + (", several of them with commas, or none" if self.several else "")
                raise ValueError(f"option {self.name}: {word!r} is not one of {known}")
        if self.several:
            return () if text == NONE else tuple(dict.fromkeys(words))
        return text == "on" if self.values == SWITCH else text


@dataclass(frozen=True)
class PaperMethod:
    """A paper's method, by name.

    Attributes:
        build: (student's modality, teacher's modality, options by name) -> the intended method, for any pair.
        pairs: (student, teacher) that the paper itself has, the usual one first.
        options: of ``build``.
        differences: between paper, released code and kdlab that are no quirks, and why; Markdown, a point each.
    """

    build: Callable[..., Method]
    pairs: tuple[tuple[Modality, Modality], ...]
    options: tuple[Option, ...] = ()
    differences: tuple[str, ...] = ()

    def __call__(self, student: Modality, teacher: Modality, given: Mapping[str, str] | None = None) -> Method:
        """The intended method for a pair of modalities, with some options as words.

        Raises:
            ValueError: an unknown option, or a value that it does not take.
        """
        known = {option.name: option for option in self.options}
        _known(given or {}, known)
        values: dict[str, Any] = {name: known[name].read(text) for name, text in (given or {}).items()}
        return self.build(student, teacher, **values)

    def own(self, given: Mapping[str, str]) -> dict[str, str]:
        """Those of some options that are this paper's."""
        return {option.name: given[option.name] for option in self.options if option.name in given}


def together(
    papers: Sequence[PaperMethod], student: Modality, teacher: Modality, given: Mapping[str, str] | None = None
) -> Method:
    """The sum of papers' methods; an option goes to every paper that has one of that name.

    Raises:
        ValueError: an unknown option, or a value that it does not take.
    """
    given = given or {}
    _known(given, {option.name: option for paper in papers for option in paper.options})
    return reduce(add, (paper(student, teacher, paper.own(given)) for paper in papers))


def _known(given: Mapping[str, str], known: Mapping[str, Option]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; known: {', '.join(known) or 'none'}")
