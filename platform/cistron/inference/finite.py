"""A model that answers NaN has said nothing: it must stop the work and never become somebody's score."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cistron.errors import CapabilityError

Values = TypeVar("Values", bound=NDArray[np.float32] | NDArray[np.float64])


def without_nan(values: Values) -> Values:
    """Return log-probabilities or representations as they are.

    Raises:
        CapabilityError: one of them is NaN.
    """
    if np.isnan(values).any():
        raise CapabilityError(
            "the model returned NaN: its weights are damaged, or this precision does not suit them; try precision=fp32"
        )
    return values
