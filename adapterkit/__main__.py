"""`python -m adapterkit` is the command line."""

from adapterkit_cli.main import main

if __name__ == "__main__":
    main()
