"""`python -m sdllava`."""

from .commands.main import main

main()
