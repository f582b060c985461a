"""Processes beside this one, of the same interpreter and the same packages."""

import os
import sys

__all__ = ["python_command"]


def python_command(module: str) -> list[str]:
    """The command that runs a module as this process was started: with or without the working directory on the path."""
    safe = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
    return [sys.executable, *safe, "-m", module]
