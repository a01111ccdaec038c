"""``python -m twodice`` is the command ``twodice``."""

from twodice.cli.main import main

main()
