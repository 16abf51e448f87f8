"""The base of the records that results are made of."""

from __future__ import annotations

from pydantic import ConfigDict


class Strict:
    """A record that refuses fields it does not know."""

    __pydantic_config__ = ConfigDict(extra="forbid")
