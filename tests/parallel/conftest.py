"""Runs in this process leave no log handlers behind: theirs write to a terminal that pytest has closed by then."""

import logging

import pytest


@pytest.fixture(autouse=True)
def _own_handlers():
    before = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = before
