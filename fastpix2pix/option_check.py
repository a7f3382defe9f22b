"""The options of a command line, looked at before they are parsed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from tyro.conf import Positional

from .commands import TYPED, Command, DataCommand
from .errors import InputError
from .other_names import meant


def check_options(argv: Sequence[str]) -> None:
    """Refuse an option that the command does not have, with the one it may mean: the parser knows none but ours."""
    commands = _subcommands(Command) | {f"data {name}": kind for name, kind in _subcommands(DataCommand).items()}
    command = next((words for words in (" ".join(argv[:2]), *argv[:1]) if words in commands), None)
    if command is None:
        return  # the parser says which there are
    options = dict(_options(commands[command]))
    for word in argv:
        option = word.partition("=")[0]
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name in ("", "help") or options.get(name, "").startswith("--"):
            continue
        near = meant(name, options)
        hint = f": did you mean {options[near]}?" if near else ""
        raise InputError(f"unknown option {option}{hint} (fastpix2pix {command} --help lists all)")


def _subcommands(union: Any) -> dict[str, type]:
    return {word.name: kind for kind, word in map(get_args, get_args(union))}


def _options(command: Any) -> Iterator[tuple[str, str]]:
    """The options of a command, with underscores, and how each is typed."""
    for name, hint in get_type_hints(command, include_extras=True).items():
        kind, *marks = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
        if is_dataclass(kind):
            yield from _options(kind)
            continue
        option = TYPED.get(name, name)
        yield option, f"{name.upper()} without a name" if Positional in marks else f"--{option.replace('_', '-')}"
        if kind is bool:
            yield f"no_{option}", f"--no-{option.replace('_', '-')}"
