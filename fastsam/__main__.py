"""`python -m fastsam` prints what is installed, what was compiled, and which back end serves what."""

from fastsam.info import info

if __name__ == "__main__":
    print(info())
