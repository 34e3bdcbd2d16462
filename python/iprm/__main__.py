"""`python -m iprm`: the command `iprm`."""

import sys

from iprm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
