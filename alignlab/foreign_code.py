"""How functions of other packages are called: whatever they raise becomes one line."""

from collections.abc import Callable
from typing import Any

import torch

from alignlab.errors import UserError
from alignlab.kernels.plugins import FOREIGN, raised


def call_foreign(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of another package.

    Args:
        what: the package's thing that is called, and with what, for the message.
        function: is called.
        arguments: by position.

    Raises:
        UserError: it raised something; the line says what, and where. Its own UserErrors, and
            memory that runs out, pass as they are.
    """
    try:
        return function(*arguments)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except FOREIGN as error:
        raise UserError(f"{what}: {raised(error)}") from error
