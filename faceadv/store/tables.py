"""Tables for people who open them in a spreadsheet program."""

__all__ = ["csv_safe"]

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def csv_safe(value: object) -> object:
    """The value of a cell; a text that a spreadsheet would run as a formula gets an apostrophe in front.

    Source: OWASP, "CSV Injection". Numbers come back as they are, so that -0.5 stays a number.
    """
    return "'" + value if isinstance(value, str) and value.startswith(FORMULA) else value
