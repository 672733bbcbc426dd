"""Errors whose message is for the user, and one line of what a library raised."""


class UserError(Exception):
    """Something the user can fix: one line that names the thing and the fix.

    The command line prints it without a traceback and exits with code 2.
    """


def one_line(error: object) -> str:
    """A message of several lines in one."""
    return " ".join(str(error).split())


def first_line(error: object) -> str:
    """The first line of a message; libraries put advice for their own users below it."""
    return str(error).strip().split("\n", 1)[0]
