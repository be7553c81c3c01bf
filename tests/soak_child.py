"""train.py as tests of `make soak` start it, also below a launcher: python tests/soak_child.py WORDS"""

import sys

import train

if __name__ == "__main__":
    sys.exit(train.main())
