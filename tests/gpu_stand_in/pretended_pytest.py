"""pytest on the pretended device: `python pretended_pytest.py …` is `python -m pytest …` there."""

import sys

from pretended_torch import install

if __name__ == "__main__":
    install()
    import pytest

    sys.exit(pytest.main(sys.argv[1:]))
