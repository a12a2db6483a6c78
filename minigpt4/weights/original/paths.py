"""Paths in the original's YAML files: which are placeholders, and where the others may lie. Opens nothing."""

from pathlib import Path

from minigpt4.weights.original.configs import OriginalYaml, Setting

PLACEHOLDERS = ("/path/to", "path/to/", "path_to", "your_path", "/PATH", "PATH_TO", "please set this value")


def is_placeholder(text: str) -> bool:
    """Whether a path stands there only to be replaced, as in the original's own files."""
    return any(placeholder in text for placeholder in PLACEHOLDERS)


def candidates(text: str, setting: Setting, read: OriginalYaml) -> list[Path]:
    """List where a path may lie, the likeliest first.

    Args:
        text: The path.
        setting: The value it comes from.
        read: The files that were read.

    Returns:
        The path itself if it is absolute; else below the YAML's folder, the working directory and the original tree's
        root. For an option of the command line the working directory comes first.
    """
    path = Path(text).expanduser()
    if path.is_absolute():
        return [path]
    beside = (setting.file or read.path).absolute().parent
    root = read.path.absolute().parent.parent
    order = [beside, Path.cwd(), root] if setting.file else [Path.cwd(), beside, root]
    return [folder / path for folder in dict.fromkeys(order)]
