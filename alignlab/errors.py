"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something in a recipe, a path or an option is wrong.

    The message is one line that names the thing and the fix; the command line prints it
    without a traceback and exits with code 2.
    """
