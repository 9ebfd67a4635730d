"""Integer division that rounds up. Here, because every folder may import it."""


def ceil_div(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up to an integer."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return ceil_div(value, multiple) * multiple
