"""The three ways a command may fail on purpose; anything else is a bug and shows its traceback."""


class Fastpix2pixError(Exception):
    """Base of all expected failures. The message says what was given, what is allowed and what to do."""

    exit_code = 1


class InputError(Fastpix2pixError):
    """Bad input or option (exit code 2). No ValueError: of those the option parser makes messages of its own."""

    exit_code = 2


class EnvironmentFailed(Fastpix2pixError, RuntimeError):
    """Device, disk, memory or a missing library failed (exit code 3)."""

    exit_code = 3


class CheckFailed(Fastpix2pixError):
    """A check the user asked for said no (exit code 4)."""

    exit_code = 4
