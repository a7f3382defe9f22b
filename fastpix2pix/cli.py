"""The command line: parse, run one command, turn expected failures into one line and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .commands import Command, TrainCommand, as_typed
from .config import Train
from .console import leave_stdout, say
from .errors import EnvironmentFailed, Fastpix2pixError
from .option_check import check_options

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
_COMMAND = Annotated[Command, tyro.conf.arg(help="")]  # else tyro parses a file of its own for it, which takes 50 ms
_DESCRIPTION = "Train paired image-to-image translation (pix2pix) and run it. --debug shows the traceback of an error."


def parse(argv: list[str]) -> Any:
    """The command of a command line."""
    check_options(argv)
    options: dict[str, Any] = {"config": (tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)}
    if argv[:1] == ["train"]:
        options["default"] = TrainCommand(tyro.MISSING, tyro.MISSING, _train_defaults(argv[1:]))
    return tyro.cli(_COMMAND, args=argv, prog="fastpix2pix", description=_DESCRIPTION, **options)


@dataclass(frozen=True)
class _Start:
    """What of `train` decides the defaults of its other options."""

    out: Path | None = None
    resume: bool = False
    auto_resume: bool = False
    init: str | None = None
    init_discriminator: str | None = None


def _train_defaults(argv: list[str]) -> Train:
    """The options of `train` where no others are given: those of the run that it resumes or the models it starts from.

    They are read before all others, which may be valid only together with these.
    """
    start, _ = tyro.cli(_Start, args=argv, prog="fastpix2pix train", add_help=False, return_unknown_args=True)
    if start.out and (start.resume or start.auto_resume):
        from .training.record import recorded_config, resumes

        if resumes(start.out, start.resume or "auto"):
            return recorded_config(start.out)
    if start.init or start.init_discriminator:
        from .training.start import defaults_of_models

        return defaults_of_models(start.init, start.init_discriminator)
    return Train()


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code (README, "Exit codes")."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        try:
            command = parse([a for a in argv if a != "--debug"])
        except BrokenPipeError:  # of --help, as `| head` leaves it
            leave_stdout()
            return 0
        return int(command())
    except (Fastpix2pixError, OSError, MemoryError, RuntimeError) as error:
        expected = _as_expected(error)
        if expected is None:
            raise
        if debug:
            traceback.print_exc()
        say(f"error: {as_typed(str(expected))}")
        return expected.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return 130


def _as_expected(error: BaseException) -> Fastpix2pixError | None:
    """The error as one of the expected failures, or None for a bug."""
    if isinstance(error, Fastpix2pixError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return EnvironmentFailed(f"{error.filename or 'disk'}: {error.strerror}")
    text = (str(error).splitlines() or ["allocation failed"])[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return EnvironmentFailed(f"out of memory ({text}); lower --batch, the size (train: --crop-size) or --ngf")
    if text.startswith("DataLoader worker"):  # raised by a signal handler, wherever the main thread is
        return EnvironmentFailed(f"a loading worker died ({text}); too little memory? lower --workers")
    return None


if __name__ == "__main__":
    sys.exit(main())
