"""Errors whose message is for the user, and one line of what a library raised."""

from alignlab.passwords import without_password

MACHINE_ERROR, USER_ERROR = 1, 2
"""Exit codes of the command line, by what is to blame."""


class UserError(Exception):
    """Something the user can fix: one line that names the thing and the fix.

    The command line prints it without a traceback and exits with code 2. What a message quotes may
    hold line breaks, NUL or half a character: they are shown as escapes. Passwords in URLs are
    left out.
    """

    def __init__(self, message: object) -> None:
        super().__init__(printable(without_password(str(message))))


class EndedEarlyError(Exception):
    """Ends a training on purpose: `on_evaluation` may raise it where the rest is not worth it."""


def printable(text: str) -> str:
    """The text in one line: line breaks, control characters and lone surrogates as escapes."""
    return "".join(c if c.isprintable() or c == "\u200d" else ascii(c)[1:-1] for c in text)


def shown(value: object, length: int = 80) -> str:
    """A value as a message quotes it: its `repr`, cut where it is long."""
    try:
        text = without_password(repr(value))  # which a cut may make unrecognisable
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    except RecursionError:
        return "a value nested too deep to show"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def one_line(error: object) -> str:
    """A message of several lines in one."""
    return " ".join(str(error).split())


def first_line(error: object) -> str:
    """The first line of a message; libraries put advice for their own users below it."""
    return str(error).strip().split("\n", 1)[0]
