"""The one exception that the command line turns into a line of text instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can put right: the message says what is wrong, what is allowed and how to fix it."""
