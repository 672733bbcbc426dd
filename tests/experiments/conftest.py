"""What the tests of pages ask for."""

from types import ModuleType

import pytest

import browser_tools


@pytest.fixture(scope="session")
def browser() -> ModuleType:
    """Opens and prints pages."""
    if not browser_tools.CHROMIUM:
        pytest.skip("no chromium or google-chrome is installed")
    return browser_tools
