"""The command line: finds the command, says errors in one line."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from kdlab.commands.ablate import ablate
from kdlab.commands.evaluate import evaluate
from kdlab.commands.export import export
from kdlab.commands.machine import demo, doctor, overfit, simulate
from kdlab.commands.methods import methods, parity
from kdlab.commands.plan import plan
from kdlab.commands.runs import compare, runs
from kdlab.commands.train import train

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "simulate": simulate,
    "plan": plan,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "runs": runs,
    "ablate": ablate,
    "export": export,
    "methods": methods,
    "parity": parity,
    "doctor": doctor,
    "overfit": overfit,
}
"""The commands, in the order of the help."""


def _help() -> str:
    lines = [
        "usage: kdlab COMMAND ...",
        "",
        "Cross-modal knowledge distillation for BEV 3D object detection.",
        "",
        "commands:",
    ]
    lines += [f"  {name:10s} {str(command.__doc__).splitlines()[0]}" for name, command in COMMANDS.items()]
    lines += [
        "",
        "kdlab COMMAND --help shows a command's options and their defaults.",
        "--debug (or KDLAB_DEBUG=1) shows tracebacks.",
    ]
    return "\n".join(lines)


def _say(error: BaseException) -> None:
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__
    print(f"kdlab: error: {text}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        argv: the words after ``kdlab``; those of the process where left out.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get("KDLAB_DEBUG", "") not in ("", "0") or "--debug" in args
    args = [a for a in args if a != "--debug"]
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        print(f"kdlab {version('kdlab')}")
        return 0
    if args[0] not in COMMANDS:
        close = difflib.get_close_matches(args[0], COMMANDS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        print(f"kdlab: error: no command {args[0]!r}; {hint}known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[args[0]](args[1:])
    except KeyboardInterrupt as error:
        if str(error):
            print(f"kdlab: {error}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `kdlab methods | head`
        sys.stdout = None
        return 1
    except (OSError, ValueError, RuntimeError, ArithmeticError, ImportError) as error:
        if debug:
            traceback.print_exc()
        _say(error)
        return 1


if __name__ == "__main__":  # accelerate launch -m kdlab.cli
    sys.exit(main())
