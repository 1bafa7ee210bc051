"""From angles to places of joints: exponential maps along a tree of bones of fixed lengths."""

from __future__ import annotations

import numpy as np

METRES = 2.54 / 100 / 0.45  # of a unit of the CMU data base, by its own account
PARENT = (-1, 0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 10, 11, 0, 13, 14, 15, 16, 17, 18, 15, 20, 21, 22, 23, 24, 25, 23, 27, 15, 29, 30,
          31, 32, 33, 34, 32, 36)
OFFSET = {  # from a joint's parent to it in the rest pose, in units of the data base; the others coincide with their parents
    2: (1.65674, -1.80282, 0.62477), 3: (2.5972, -7.13576, 0), 4: (2.49236, -6.8477, 0), 5: (0.19704, -0.54136, 2.14581),
    6: (0, 0, 1.11249), 8: (-1.6107, -1.80282, 0.62476), 9: (-2.59502, -7.12977, 0), 10: (-2.4678, -6.78024, 0),
    11: (-0.23024, -0.63258, 2.13368), 12: (0, 0, 1.11569), 14: (0.01961, 2.0545, -0.14112), 15: (0.01021, 2.06436, -0.05921),
    17: (0.00713, 1.56711, 0.14968), 18: (0.03429, 1.56041, -0.10006), 19: (0.01305, 1.6256, -0.05265),
    21: (3.54205, 0.90436, -0.17364), 22: (4.86513, 0, 0), 23: (3.35554, 0, 0), 25: (0.66117, 0, 0), 26: (0.53306, 0, 0),
    28: (0.5412, 0, 0.5412), 30: (-3.49802, 0.75994, -0.32616), 31: (-5.02649, 0, 0), 32: (-3.36431, 0, 0),
    34: (-0.73041, 0, 0), 35: (-0.58887, 0, 0), 37: (-0.59786, 0, 0.59786)}
CHANNELS = 3 * (1 + len(PARENT))
DISTINCT = (0, *OFFSET)  # the joints of `layouts.CMU`


def rotations(vector: np.ndarray) -> np.ndarray:
    """Exponential maps (…, 3), axis × angle in radians, to matrices (…, 3, 3) (Rodrigues)."""
    angle = np.linalg.norm(vector, axis=-1)[..., None, None]
    x, y, z = np.moveaxis(vector / np.maximum(angle[..., 0], 1e-12), -1, 0)
    o = np.zeros_like(x)
    cross = np.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(*vector.shape, 3)
    turned: np.ndarray = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * (cross @ cross)
    return turned


def joints(channels: np.ndarray) -> np.ndarray:
    """Places (T, 28, 3) in metres, y up, of CMU mocap as the motion-prediction field has it (Li et al. 2018).

    channels: (T, 117): where the root is, in units of the data base, then an exponential map for each of 38 joints, relative to
    its parent, for vectors that are rows: p_j = p_parent + offset_j R_parent, R_j = E_j R_parent.
    """
    turn = rotations(channels[:, 3:].reshape(len(channels), -1, 3))
    place = np.zeros((len(channels), len(PARENT), 3))
    place[:, 0] = channels[:, :3]
    for j, parent in enumerate(PARENT[1:], 1):
        place[:, j] = place[:, parent] + np.asarray(OFFSET.get(j, (0, 0, 0))) @ turn[:, parent]
        turn[:, j] = turn[:, j] @ turn[:, parent]
    return place[:, DISTINCT] * METRES
