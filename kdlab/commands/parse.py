"""Command-line words to typed options."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

A = TypeVar("A")


def parse(kind: Callable[..., A], command: str, args: Sequence[str], description: str) -> A:
    """Options of a command from its words; prints help or what is wrong and exits where that is called for.

    Args:
        kind: dataclass of the options, or a function with them as parameters, which is called.
        command: the word after ``kdlab``.
        args: the words after the command.
        description: shown in the help.
    """
    # A config's alternatives (`None` or a dataclass) are plain flags here, never subcommands.
    marks = (tyro.conf.AvoidSubcommands,)
    parsed: A = tyro.cli(kind, prog=f"kdlab {command}", args=list(args), description=description, config=marks)
    return parsed
