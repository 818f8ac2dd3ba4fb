"""The command line: `graphcomp inspect | compress | verify | export | bench | report | init`.

Exit codes: 0 done; 1 an error that graphcomp did not expect; 2 what was asked cannot be done (options, inputs, data);
3 the model cannot be captured, or nothing of it can be pruned; 4 a law does not hold, or `verify` found a fault; 5 a
file or a folder cannot be read or written, or another runtime refuses it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        import rich
        import typer
    except ImportError as error:
        sys.stderr.write(f"the command line needs typer and rich ({error}): pip install 'graphcomp[cli]'\n")
        raise SystemExit(5) from error
    assert typer and rich
    from graphcomp.cli.app import run

    raise SystemExit(run())
