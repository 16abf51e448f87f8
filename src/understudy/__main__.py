"""Run the command line as ``python -m understudy``."""

from understudy.cli import main

main()
