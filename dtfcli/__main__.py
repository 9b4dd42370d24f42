"""`python -m dtfcli` is `dtf`."""

from dtfcli.cli.app import main

if __name__ == "__main__":
    main()
