"""The command line."""

from kdkit.cli.commands import app, main

__all__ = ["app", "main"]
