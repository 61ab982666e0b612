"""Errors of matched pairs, in the very operations of the devkit where a bit decides."""

from __future__ import annotations

import numpy as np

from kdlab.metrics.boxes import Array, EvalBoxes


def dots(a: Array, b: Array) -> Array:
    """Scalar products of vectors [K, n], float64 [K].

    Through BLAS pair by pair, as `numpy.dot` takes them: a sum in another order or without fused multiply-add may
    differ in the last bit, and exact ties of distances decide who matches whom.
    """
    product: Array = np.matmul(a[:, None, :], b[:, :, None])[:, 0, 0]
    return product


def lengths(vectors: Array) -> Array:
    """Euclidean norms of vectors [K, n], bit for bit those of `numpy.linalg.norm` on each; float64 [K]."""
    norms: Array = np.sqrt(dots(vectors, vectors))
    return norms


def rotation_matrices(quaternions: Array) -> Array:
    """Rotation matrices [K, 3, 3] of quaternions [K, 4] as pyquaternion gives them.

    A quaternion whose squared norm is within 1e-14 of 1, or 0, stays as it is: zeros give a matrix of zeros.
    """
    square = dots(quaternions, quaternions)
    other = ~(np.abs(1.0 - square) < 1e-14) & (np.sqrt(square) > 0)
    unit = quaternions.copy()
    unit[other] /= np.sqrt(square[other])[:, None]
    w, x, y, z = unit.T
    # Multiplication from the left by the quaternion, and from the right by its conjugate (transposed).
    left = np.stack((w, -x, -y, -z, x, w, -z, y, y, z, w, -x, z, -y, x, w), 1).reshape(-1, 4, 4)
    right = np.stack((w, -x, -y, -z, x, w, z, -y, y, -z, w, x, z, y, -x, w), 1).reshape(-1, 4, 4)
    turn: Array = np.matmul(left, right.transpose(0, 2, 1))[:, 1:, 1:]
    return turn


def yaws(quaternions: Array) -> Array:
    """Heading in the ground plane of quaternions [K, 4], radians, float64 [K]."""
    turn = rotation_matrices(quaternions)
    angle: Array = np.arctan2(turn[:, 1, 0], turn[:, 0, 0])
    return angle


def pair_errors(truth: EvalBoxes, predicted: EvalBoxes, period: float) -> dict[str, Array]:
    """True-positive errors of K pairs, float64 [K] each; NaN where one is not defined.

    Args:
        truth: K annotations.
        predicted: the K predictions matched to them.
        period: of the orientation in radians: a barrier is the same after half a turn.
    """
    low = np.minimum(truth.size, predicted.size).prod(1)
    union = truth.size.prod(1) + predicted.size.prod(1) - low
    turn = (yaws(truth.rotation) - yaws(predicted.rotation) + period / 2) % period - period / 2
    turn[turn > np.pi] -= 2 * np.pi
    right = np.where(truth.attribute < 0, np.nan, truth.attribute == predicted.attribute)
    return {
        "trans_err": lengths(predicted.translation[:, :2] - truth.translation[:, :2]),
        "vel_err": lengths(predicted.velocity - truth.velocity),
        "scale_err": 1 - low / union,
        "orient_err": np.abs(turn),
        "attr_err": 1 - right,
    }
