"""Numbers of bytes as text."""

UNITS = ("bytes", "kB", "MB", "GB")  # of 1,000 each


def format_bytes(size: float) -> str:
    """A number of bytes with three digits: 999 bytes, 2.02 MB, 23.8 GB, 1,500 GB."""
    unit = 0
    while size >= 999.5 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    number = f"{size:,.0f}" if size >= 999.5 else f"{size:.3g}"
    return f"{number} {UNITS[unit]}"
