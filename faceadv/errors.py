"""Errors that a user can mend: one sentence that says what to do, which the command line prints (exit status 2)."""

__all__ = ["Failed", "Invalid", "Missing", "UserError"]


class UserError(Exception):
    """What a user can mend. Every other exception is a fault of the program and shows its traceback."""


class Invalid(UserError, ValueError):
    """A value, a name or a file that makes no sense here."""


class Missing(UserError, FileNotFoundError):
    """Something that must be fetched, installed or named first."""


class Failed(UserError, RuntimeError):
    """Something outside the program went wrong: a download, a full disk, a notebook."""
