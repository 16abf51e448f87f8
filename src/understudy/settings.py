"""The base of everything that a recipe describes. Importing it does not import torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# More than any machine has cores; torch and the runtimes fail on numbers beyond 32 bits.
MAX_THREADS = 4096


class Section(BaseModel):
    """Settings that do not change once made; an unknown key or a value of NaN is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
