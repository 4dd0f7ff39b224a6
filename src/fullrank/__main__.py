"""``python -m fullrank``."""

from fullrank.cli.main import main

main()
