"""python -m mcar_lib: the same as the command mcar."""

from mcar_lib.cli import main

main()
