"""``python -m cortex.gateway`` and the command ``cortex``."""

from __future__ import annotations

from cortex.gateway.cli import app


def main() -> None:
    """Run the command line."""
    app(prog_name="cortex")


if __name__ == "__main__":
    main()
