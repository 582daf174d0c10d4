"""`python -m motip.cli`: the `motip` command without its console script."""

from motip.cli.main import main

main()
