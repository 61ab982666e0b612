"""Matched boxes: who is paired with whom, and what their figures say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure

from kdlab.evaluate import Found
from kdlab.sample import CLASSES, Boxes3D, Detections, Sample
from kdlab.view.results.matched import pairs, sizes, turns

CAR, WALKER, BARRIER = (CLASSES.index(name) for name in ("car", "pedestrian", "barrier"))


def found(sample: Sample, values: torch.Tensor, labels: list[int], scores: list[float]) -> Found:
    return Found(sample.token, Detections(values, torch.tensor(labels), torch.tensor(scores)), sample.global_from_key)


def test_the_nearest_of_the_class_within_reach(sample: Sample) -> None:
    car = sample.boxes.values[0].nan_to_num()
    shift = torch.tensor([[1.5, 0, 0, 0, 0, 0, 0, 0, 0], [0.5] + [0.0] * 8, [0.1] + [0.0] * 8, [0.0] * 9])
    seen = found(sample, car + shift, [CAR, CAR, WALKER, CAR], [0.9, 0.9, 0.9, 0.1])
    true, predicted, labels = pairs([sample], [seen])
    assert labels.tolist() == [CAR]
    assert true[0].nan_to_num().equal(car) and predicted[0, 0] == pytest.approx(car[0] + 0.5)
    assert len(pairs([sample], [seen], min_score=0.95)[0]) == 0
    assert len(pairs([sample], [seen], within=0.4)[0]) == 0
    none = replace(sample, boxes=Boxes3D.empty())
    assert [tuple(t.shape) for t in pairs([none], [seen])] == [(0, 9), (0, 9), (0,)]


def test_the_mean_turn_counts_barriers_up_to_half_a_turn(draw: Callable[[Figure], Figure]) -> None:
    true = torch.zeros(3, 9)
    predicted = true.clone()
    predicted[:, 6] = torch.tensor([math.pi / 2, -math.pi / 2 + 2 * math.pi, math.pi - 0.1])
    titles = [ax.get_title() for ax in draw(turns(true, predicted, torch.tensor([CAR, WALKER, BARRIER]))).axes]
    assert titles[0] == "classes with a front: 1, mean 1.57 rad off"
    assert titles[1] == "pedestrians: 1, mean 1.57 rad off"
    assert titles[2] == "barriers, up to half a turn: 1, mean 0.10 rad off"


def test_sides_are_drawn_over_the_true_ones(draw: Callable[[Figure], Figure]) -> None:
    true = torch.tensor([[0, 0, 0, 4.0, 2, 1.5, 0, 0, 0]])
    swapped = true[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
    axes = draw(sizes(true, swapped)).axes
    dots = [ax.collections[0].get_offsets().tolist() for ax in axes]
    assert dots == [[[4.0, 2.0]], [[2.0, 4.0]], [[1.5, 1.5]]]
    assert len(draw(sizes(true[:0], true[:0])).axes) == 3
