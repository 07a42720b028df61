"""`python -m slidetune`: the command line."""

from slidetune.cli.app import main

main()
