"""``python -m steploop`` is the command line."""

from steploop.tools.cli import main

if __name__ == "__main__":
    main()
