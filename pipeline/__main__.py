"""`python -m pipeline` is `tapeline`."""

from pipeline.commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
