"""Benchmarks: `python -m bench.engine` and `python -m bench.http`; what the numbers mean is in README.md."""

import sys
from pathlib import Path

# When a file of this folder is run as a script, the folder comes first on the path, and its http.py would stand for
# Python's own, which JAX imports.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
