"""`python -m kdkit`: the command line, for launchers that start a module."""

from kdkit.cli import main

main()
