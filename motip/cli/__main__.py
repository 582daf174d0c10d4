"""`python -m motip.cli`: the `motip` command where its console script is not on the PATH."""

from motip.cli.main import main

main()
