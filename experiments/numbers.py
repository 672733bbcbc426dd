"""Numbers as a reader sees them: three or four significant digits, true minus signs."""

import math

DASH = "—"
_MINUS = "\N{MINUS SIGN}"


def format_number(value: float, *, sign: bool = False) -> str:
    """Four significant digits; whole numbers up to a billion in full, with thousands separators.

    >>> format_number(0.123456), format_number(1234567.0), format_number(0.5, sign=True)
    ('0.1235', '1,234,567', '+0.5000')
    """
    if not math.isfinite(value):
        return "not finite"
    return _signed(_digits(value, 4), sign)


def format_spread(mean: float, std: float | None, *, sign: bool = False) -> tuple[str, str]:
    """Mean and spread with the same decimals, those of the spread's second significant digit.

    The mean keeps at most six significant digits. Without a spread (one seed) it has four and the
    second text is empty.

    >>> format_spread(0.412345, 0.00421), format_spread(12.3456, None)
    (('0.4123', '0.0042'), ('12.35', ''))
    """
    if std is None or not math.isfinite(mean) or not math.isfinite(std):
        return format_number(mean, sign=sign), ""
    if std == 0.0 or _scientific(mean) or _scientific(std):
        return format_number(mean, sign=sign), format_number(std)
    decimals = 1 - _exponent(std)
    if mean != 0.0:
        decimals = min(decimals, 5 - _exponent(mean))
    decimals = max(decimals, 0)
    spread = f"{std:,.{decimals}f}"
    if float(spread.replace(",", "")) == 0.0:
        spread = format_number(std)
    return _signed(f"{mean:,.{decimals}f}", sign), spread


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, the largest two units.

    >>> format_duration(7265.0), format_duration(75.2), format_duration(3.21)
    ('2 h 1 min', '1 min 15 s', '3.2 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))


def _scientific(value: float) -> bool:
    return value != 0.0 and not 1e-4 <= abs(value) < 1e9


def _digits(value: float, significant: int) -> str:
    if _scientific(value):
        return f"{value:.{significant}g}"
    if value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.{max(significant - 1 - _exponent(value), 0)}f}"


def _signed(text: str, sign: bool) -> str:
    body = text.lstrip("-").replace("-", _MINUS)
    if not any(digit in body for digit in "123456789"):
        return body
    if text.startswith("-"):
        return _MINUS + body
    return f"+{body}" if sign else body
