"""Tiny random models of many architectures, of transformers' own classes, to show that a type needs no code of its own.

`family_kit.py` has what the builders share; `tiny.py` has the three families that most tests use.
"""

from __future__ import annotations

import families_grids  # noqa: F401  each registers its builders
import families_others  # noqa: F401
import families_squares  # noqa: F401
from family_kit import BUILD, build, finish

__all__ = ["BUILD", "build", "finish"]
