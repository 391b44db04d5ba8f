"""`python -m fastsam` prints what is installed and which back end serves what; `... tune` measures Triton's tiles."""

import sys

from fastsam.info import info

if __name__ == "__main__":
    if sys.argv[1:2] == ["tune"]:
        from fastsam.tune import main

        main(sys.argv[2:])
    elif sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
    elif sys.argv[1:]:
        sys.exit(
            f"python -m fastsam: the command must be tune, or none to print what is installed, got {sys.argv[1]!r}"
        )
    else:
        print(info())
