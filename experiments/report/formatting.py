"""Numbers as a reader sees them: three or four significant digits, true minus signs."""

import math

DASH = "—"
_MOST_DECIMALS = 15  # more is noise, or an end that is almost 0
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
    decimals = _decimals(mean, std)
    if decimals is None:
        return format_number(mean, sign=sign), format_number(std)
    spread = f"{std:,.{decimals}f}"
    if float(spread.replace(",", "")) == 0.0:
        spread = format_number(std)
    return _signed(f"{mean:,.{decimals}f}", sign), spread


def format_interval(
    mean: float, low: float, high: float, *, sign: bool = False, unit: str = ""
) -> str:
    """Mean and interval with the same decimals, chosen by half the interval's width.

    There are as many decimals as it takes to see that an interval excludes 0.

    >>> format_interval(0.12345, 0.0741, 0.1628, sign=True), format_interval(3, 1, 5, unit="%")
    ('+0.123 [0.074, 0.163]', '3.0% [1.0%, 5.0%]')
    >>> format_interval(0.5, 0.001, 0.999), format_interval(0.5, -0.001, 1.001)
    ('0.500 [0.001, 0.999]', '0.50 [0.00, 1.00]')
    """
    decimals = _decimals(mean, (high - low) / 2)
    nearest = min(abs(low), abs(high))
    if decimals is not None and 0.0 < nearest < math.inf and not low <= 0.0 <= high:
        decimals = max(decimals, -_exponent(nearest))
    if decimals is not None and decimals > _MOST_DECIMALS:
        decimals = None

    def text(value: float, sign: bool) -> str:
        if decimals is None:
            return format_number(value, sign=sign) + unit
        return _signed(f"{value:,.{decimals}f}", sign) + unit

    return f"{text(mean, sign)} [{text(low, False)}, {text(high, False)}]"


def format_p(value: float) -> str:
    """A p-value as papers print it.

    >>> format_p(0.0312), format_p(0.2), format_p(1e-6), format_p(1.0)
    ('0.031', '0.20', '<0.001', '1.00')
    >>> format_p(0.0496), format_p(0.0504)
    ('0.0496', '0.0504')
    """
    if not math.isfinite(value):
        return "not finite"
    if value < 0.001:
        return "<0.001"
    text = f"{value:.3f}" if value < 0.0995 else f"{value:.2f}"
    return f"{value:.4f}" if text == "0.050" else text  # which side of 5% it is on


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, the largest two units.

    >>> format_duration(7265.0), format_duration(75.2), format_duration(3.21)
    ('2 h 1 min', '1 min 15 s', '3.2 s')
    """
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _decimals(mean: float, spread: float) -> int | None:
    """Decimals that show two digits of the spread; None where fixed decimals do not fit."""
    if not (math.isfinite(mean) and math.isfinite(spread)):
        return None
    if spread == 0.0 or _scientific(max(abs(mean), spread)):
        return None
    decimals = 1 - _exponent(spread)
    if mean != 0.0:
        decimals = min(decimals, 5 - _exponent(mean))
    return max(decimals, 0)


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
