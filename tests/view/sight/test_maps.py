from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from matplotlib.figure import Figure

from kdlab.sample import Features
from kdlab.view.sight.maps import bev_stages, cosine_map, principal, stage_map

Draw = Callable[[Figure], Figure]


def test_one_basis_for_both() -> None:
    a = torch.randn(6, 4, 5)
    first, second = principal(a, a.clone())
    assert first.shape == (4, 5, 3)
    torch.testing.assert_close(first, second)
    assert principal(a[:2], a[:2])[0].isfinite().all()


def test_cosine() -> None:
    a = torch.randn(6, 4, 5)
    torch.testing.assert_close(cosine_map(a, 2 * a), torch.ones(4, 5))
    assert cosine_map(a, torch.zeros_like(a)).isnan().all()


def test_stages_by_name() -> None:
    features = Features(bev=torch.zeros(2, 3, 4, 4), camera_bev=torch.ones(2, 1, 5, 4, 4))
    assert stage_map(features, "camera_bev", 1).shape == (5, 4, 4)
    assert bev_stages(features) == ["camera_bev", "bev"]
    for wrong in ("neck", "stages[0]", "beef", "lift", "heatmap"):
        with pytest.raises(ValueError, match="this detector has camera_bev, bev"):
            stage_map(features, wrong)
