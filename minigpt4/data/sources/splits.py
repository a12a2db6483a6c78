"""Which files of a data set are to learn from: hubs keep those for testing in the same folder."""

import re
from collections.abc import Sequence

_OTHERS = re.compile(r"(^|[/_.-])(test|val|valid|validation|dev)\d*([/_.-]|$)")
LEFT_OUT = "file of another split"


def training_files(names: Sequence[str]) -> list[str]:
    """Leave out files whose names say that they are for testing; all are kept where every name says so.

    Args:
        names: Relative to the folder that a person named, so that its own name does not count.
    """
    return [name for name in names if not _OTHERS.search(name.lower())] or list(names)
