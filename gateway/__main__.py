"""``python -m cortex.gateway`` and the command ``cortex``."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line; Ctrl-C during the imports, a noticeable while, ends it quietly."""
    is_interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_interruptible:  # in the background it may be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cortex.gateway.cli import app

    if is_interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app(prog_name="cortex")


if __name__ == "__main__":
    main()
