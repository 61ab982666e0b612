import pytest
import torch

from kdlab.models.fusion import FUSERS, GatedFuser


@pytest.mark.parametrize("name", FUSERS)
def test_widths_and_gradients(name: str) -> None:
    fuser = FUSERS[name](4, 6, 8)  # type: ignore[index]
    camera, lidar = torch.randn(2, 4, 5, 7, requires_grad=True), torch.randn(2, 6, 5, 7, requires_grad=True)
    fuser(camera, lidar).square().sum().backward()
    assert fuser(camera, lidar).shape == (2, 8, 5, 7)
    assert all(x.grad is not None and x.grad.any() for x in (camera, lidar, *fuser.parameters()))


def test_the_gate_is_one_number_per_channel_and_sample() -> None:
    torch.manual_seed(0)
    fuser = GatedFuser(4, 6, 8).eval()
    camera, lidar = torch.randn(2, 4, 5, 7), torch.randn(2, 6, 5, 7)
    both = torch.cat((camera, lidar), 1)
    means = both.mean((2, 3))
    gate = torch.sigmoid(means @ fuser.gate.weight[:, :, 0, 0].T + fuser.gate.bias)
    torch.testing.assert_close(fuser(camera, lidar), fuser.mix(both * gate[:, :, None, None]))
