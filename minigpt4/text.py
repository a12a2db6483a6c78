"""A number with the name of what it counts."""


def counted(number: int, what: str) -> str:
    """Write how many there are of something: `1 picture`, `2,000 pictures`.

    Args:
        number: How many.
        what: The name of one, which forms its plural with an s.
    """
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
