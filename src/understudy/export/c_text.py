"""Text in C sources; imports nothing heavy."""

from __future__ import annotations

import string


def c_string(text: str) -> str:
    """Return a C string literal of the text in UTF-8.

    All but letters, digits and plain marks become octal escapes of three digits, which, unlike
    hexadecimal ones, end by themselves.
    """
    plain = set((string.ascii_letters + string.digits + " _-.,:;+/()").encode())
    parts = [chr(byte) if byte in plain else f"\\{byte:03o}" for byte in text.encode()]
    return f'"{"".join(parts)}"'
