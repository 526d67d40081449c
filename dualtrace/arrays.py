"""The array types that the whole house speaks. Shapes stand in comments where arrays are declared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float64]
