"""The one exception whose message is meant for the person at the keyboard, and text of others."""


class UserError(Exception):
    """Something in a recipe, a path or an option is wrong.

    The message is one line that names the thing and the fix; the command line prints it
    without a traceback and exits with code 2.
    """


def one_line(error: object) -> str:
    """The text of an error with every run of white space as one space."""
    return " ".join(str(error).split())


def first_line(error: object) -> str:
    """The first line of an error's text that is not empty."""
    return str(error).strip().split("\n", 1)[0]
