"""``python -m gna_flex``: the same as ``gna-flex``."""

from gna_flex.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
