"""Distances and headings, bit for bit those that the devkit computes one by one."""

import numpy as np
from nuscenes.eval.common.utils import quaternion_yaw
from pyquaternion import Quaternion

from kdlab.metrics.errors import lengths, rotation_matrices, yaws


def test_lengths_are_those_of_single_vectors() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(60_000, 2)) * scale for scale in (1e-3, 1.0, 1e3)]
    parts.append(rng.integers(-40, 41, (60_000, 2)) * 0.1)
    vectors = np.concatenate(parts)
    assert np.array_equal(lengths(vectors), np.array([np.linalg.norm(v) for v in vectors]))
    assert np.isnan(lengths(np.array([[np.nan, 1.0], [np.inf, np.nan]]))).all()


def test_headings_are_those_of_pyquaternion() -> None:
    rng = np.random.default_rng(1)
    given = rng.normal(size=(4000, 4))
    given[:1500] /= np.linalg.norm(given[:1500], axis=1)[:, None]
    given[1500:2000] = rng.integers(-1, 2, (500, 4))
    given[2000:2500, 2] = given[2000:2500, 0]  # Pitched by a right angle: the heading hangs on rounding.
    given[2000:2500, [1, 3]] = 0
    expected = np.array([quaternion_yaw(Quaternion(q)) for q in given])
    assert np.array_equal(yaws(given), expected)
    matrices = np.array([Quaternion(q).rotation_matrix for q in given[:200]])
    assert np.array_equal(rotation_matrices(given[:200]), matrices)
    assert (rotation_matrices(np.zeros((1, 4))) == 0).all()
