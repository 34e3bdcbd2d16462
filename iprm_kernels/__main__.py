"""The commands of `python -m iprm_kernels`: `verify`."""

import sys

from .verify.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
