"""`python -m jaxembed_server [MODEL] ...`: the same as `jaxembed serve`."""

import sys

from jaxembed_server.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["serve", *sys.argv[1:]]))
