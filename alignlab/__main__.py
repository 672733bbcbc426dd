"""Where the command `alignlab` begins: signals are handled before anything else is imported."""

from alignlab import interruption


def main() -> None:
    """Entry point of the `alignlab` command and of `python -m alignlab`."""
    interruption.run(_command_line)


def _command_line() -> None:
    from alignlab.cli import command_line

    command_line()


if __name__ == "__main__":
    main()
