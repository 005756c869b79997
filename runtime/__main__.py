"""The command ``neuron``.

The fork server's children import the main module again, so nothing may happen here on import.
"""


def main() -> None:
    """Run the command line."""
    from cortex.runtime.cli import run

    run()


if __name__ == "__main__":
    main()
