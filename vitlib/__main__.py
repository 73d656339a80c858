"""``python -m vitlib``: the command line is in ``vitlib.course.cli``."""

import atexit
import gc

from vitlib.course.cli import main

if __name__ == "__main__":
    atexit.register(gc.freeze)  # else Python spends a second at exit on searching PyTorch for garbage
    main(prog_name="python -m vitlib")
