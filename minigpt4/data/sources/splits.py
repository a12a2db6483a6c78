"""Which files and rows of a data set are to learn from: hubs keep those for testing in the same folder or table."""

import re
from collections.abc import Sequence

_OTHERS = re.compile(r"(^|[/_.-])(test|val|valid|validation|dev)\d*([/_.-]|$)")
LEFT_OUT = "file of another split"
ROW_LEFT_OUT = "row of another split"
NOT_FETCHED = "row whose picture was not fetched"


def training_files(names: Sequence[str]) -> list[str]:
    """Leave out files whose names say that they are for testing; all are kept where every name says so.

    Args:
        names: Relative to the folder that a person named, so that its own name does not count.
    """
    return [name for name in names if not _OTHERS.search(name.lower())] or list(names)


def is_of_another(split: object) -> bool:
    """Tell whether what stands in a row's column `split` says that the row is for testing."""
    return isinstance(split, str) and bool(_OTHERS.match(split.strip().lower()))
