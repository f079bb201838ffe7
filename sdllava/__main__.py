"""Runs the `sdllava` command as `python -m sdllava`."""

from .commands.main import main

main()
