"""`python -m onestill`, as `accelerate launch -m onestill` and `torchrun -m onestill` need it."""

from onestill.cli import main

main()
