"""What SimDistill computes on its way, drawn: two lifts, compensation and its places, the object mask, class errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn

from kdlab.distill import simdistill
from kdlab.models.camera import SimulatedLidar
from kdlab.models.deformable import GeometryCompensation
from kdlab.sample import Features
from kdlab.view.methods.shared import norm_map, on_map, terms_of
from kdlab.view.networks.depths import bin_centres, bins_of, extent_of, lidar_depth, metre_ticks
from kdlab.view.sensors.sensing import title_of
from kdlab.view.style import (
    BELOW,
    GREY,
    OTHERS,
    STUDENT,
    TRUTH,
    Array,
    array,
    bev_axes,
    bev_boxes_on,
    bev_image,
    colour_bar,
    new_figure,
    robust_norm,
)

if TYPE_CHECKING:
    from kdlab.view.sight import Observer, Sight


@dataclass(frozen=True)
class Branches:
    """A student's two branches on one sample; N cameras, D depth bins.

    Attributes:
        camera: BEV map of the camera branch [C, H, W].
        lifted: that of the branch that stands in for LiDAR, as it comes from its lift.
        compensated: the same behind its geometry compensation.
        camera_depth: depth probabilities of the camera branch [N, D, h, w].
        lidar_depth: those of the other one; the same where it has no lift of its own.
    """

    camera: Tensor
    lifted: Tensor
    compensated: Tensor
    camera_depth: Tensor
    lidar_depth: Tensor


def branches(sight: Sight, observer: Observer) -> Branches:
    """Run the student's camera part on the sight's images once more, and keep what its two branches make.

    Raises:
        ValueError: the student has no simulated LiDAR.
    """
    module = simulated_lidar(observer)
    kept: dict[str, Tensor] = {}
    hooks = [module.in_bev.register_forward_hook(lambda _, given, out: kept.update(lifted=given[0], compensated=out))]
    if module.depth_net is not None:
        hooks.append(module.depth_net.register_forward_hook(lambda _, __, out: kept.update(depth=out[0])))
    try:
        found = _run(sight, observer)
    finally:
        for hook in hooks:
            hook.remove()
    assert found.camera_bev is not None and found.depth is not None
    depth = found.depth[0, 0].float().cpu()
    camera, lifted, compensated = (
        m.float().cpu() for m in (found.camera_bev[0, 0], kept["lifted"][0], kept["compensated"][0])
    )
    return Branches(camera, lifted, compensated, depth, kept["depth"].float().cpu() if "depth" in kept else depth)


def simulated_lidar(observer: Observer) -> SimulatedLidar:
    """The branch of the student that stands in for LiDAR.

    Raises:
        ValueError: it has none.
    """
    camera = observer.student.camera if observer.student is not None else None
    if camera is None or camera.simulated is None:
        raise ValueError("this student has no simulated LiDAR (camera.simulated_lidar); take one of SimDistill's")
    return camera.simulated


def _compensation_of(branch: SimulatedLidar) -> GeometryCompensation:
    if not isinstance(branch.in_bev, GeometryCompensation):
        raise ValueError("this student has no geometry compensation (camera.geometry_compensation)")
    return branch.in_bev


def _run(sight: Sight, observer: Observer) -> Features:
    """The student's features of the sight's images, made anew."""
    assert observer.student is not None
    with torch.no_grad():
        found: Features = observer.student(observer.student.seen(sight.batch).to(observer.device))
    return found


@contextmanager
def _passing(*modules: nn.Module) -> Iterator[None]:
    """Modules hand on what they are given."""
    hooks = [module.register_forward_hook(lambda _, given, __: given[0]) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def two_lifts(sight: Sight, observer: Observer, camera: int = 0) -> Figure:
    """The student's two lifts: expected depths of both depth nets in one camera, and the BEV maps that they make.

    Args:
        sight: what the observer saw.
        observer: holds the student.
        camera: index into CAMERAS.

    Raises:
        ValueError: the student has no simulated LiDAR.
    """
    found, bins = branches(sight, observer), bins_of(sight)
    measured = array(lidar_depth(sight, (found.camera_depth.shape[-2], found.camera_depth.shape[-1])))
    sides = {"camera branch": found.camera_depth, "simulated LiDAR": found.lidar_depth}
    figure = new_figure(13.5, 8.0)
    axes = figure.subplots(2, 3, height_ratios=[1, 1.9])
    scatter = axes[0, 2]
    for ax, (name, chances), colour in zip(axes[0], sides.items(), ("#000000", OTHERS[0]), strict=False):
        expected = np.einsum("d,ndhw->nhw", bin_centres(bins), array(chances))
        shown = _depth_on(ax, sight, camera, expected[camera], LogNorm(bins[0], bins[1]))
        ax.set_title(f"{title_of(camera)}, expected depth: {name}", fontsize=10)
        known = (measured >= bins[0]) & (measured < bins[1])
        scatter.plot(measured[known], expected[known], ".", color=colour, markersize=2.5, label=name)
    bar = figure.colorbar(shown, ax=list(axes[0, :2]), label="depth along the camera's axis (m)", pad=0.02, **BELOW)
    metre_ticks(bar, bins)
    scatter.plot(bins[:2], bins[:2], color="black", linewidth=0.8, linestyle=":")
    scatter.set(xlabel="depth that the LiDAR measured (m)", ylabel="expected depth (m)", xlim=bins[:2], ylim=bins[:2])
    scatter.set_title("image cells with LiDAR points, six cameras", fontsize=10)
    scatter.legend(fontsize=8, frameon=False, markerscale=4, loc="upper left")
    scatter.spines[["top", "right"]].set_visible(False)
    maps = {"camera_bev": found.camera, "simulated LiDAR, lifted": found.lifted, "compensated": found.compensated}
    norm = robust_norm(*(norm_map(m[None]) for m in maps.values()))
    for ax, (name, values) in zip(axes[1], maps.items(), strict=True):
        shown = on_map(ax, sight, norm_map(values[None]), sight.grid, name, norm=norm, cmap="viridis")
    colour_bar(list(axes[1]), shown, "norm over channels", **BELOW)
    return figure


def _depth_on(ax: Axes, sight: Sight, camera: int, values: Array, norm: Normalize) -> Any:
    """Depths over a darkened image."""
    left, right, bottom, top = extent_of(sight, camera)
    image = sight.sample.images[0, camera].permute(1, 2, 0).cpu().numpy()
    ax.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    shown = ax.imshow(values, extent=(left, right, bottom, top), norm=norm, cmap="viridis_r", alpha=0.75)
    ax.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])
    return shown


def compensation_off(sight: Sight, observer: Observer) -> Figure:
    """What the student's geometry compensation does: its simulated LiDAR map and its scores, with it and without it.

    Without it, both modules (in images and in the BEV) hand on their input. The networks were trained with it: this
    tells what they make of it, not what a student without it would learn.

    Args:
        sight: what the observer saw.
        observer: holds the student.

    Raises:
        ValueError: the student has no simulated LiDAR, or no compensation in it.
    """
    module = simulated_lidar(observer)
    _compensation_of(module)
    on = _run(sight, observer)
    with _passing(module.in_images, module.in_bev):
        off = _run(sight, observer)
    figure = new_figure(13.5, 11.2)
    upper, lower = figure.subplots(2, 3)
    assert on.lidar_bev is not None and off.lidar_bev is not None
    maps, maps_off = on.lidar_bev.float(), off.lidar_bev.float()
    both, apart = (norm_map(maps), norm_map(maps_off)), norm_map(maps - maps_off)
    _on_off(list(upper), sight, both, {"norm": robust_norm(*both), "cmap": "viridis"}, "student.lidar_bev, norm")
    shown = on_map(upper[2], sight, apart, sight.grid, "what it changes", norm=robust_norm(apart), cmap="magma")
    colour_bar(upper[2], shown, "norm of the difference", **BELOW)
    scores, scores_off = (_highest(found) for found in (on, off))
    style = {"norm": Normalize(0, 1), "cmap": "inferno"}
    _on_off(list(lower), sight, (scores, scores_off), style, "highest class score")
    apart = scores - scores_off
    reach = float(np.abs(apart).max()) or 1.0
    shown = on_map(lower[2], sight, apart, sight.grid, "with − without", norm=Normalize(-reach, reach), cmap="RdBu_r")
    colour_bar(lower[2], shown, "difference of scores", **{**BELOW, "extend": "neither"})
    return figure


def _on_off(axes: list[Axes], sight: Sight, maps: tuple[Array, Array], style: dict[str, Any], label: str) -> None:
    """Two maps, with compensation and without, on one scale."""
    for ax, values, name in zip(axes, maps, ("with compensation", "without compensation"), strict=False):
        shown = on_map(ax, sight, values, sight.grid, name, **style)
    colour_bar(axes[:2], shown, label, **BELOW)


def _highest(found: Features) -> Array:
    """Highest class score of each cell [H, W]."""
    assert found.predictions is not None
    return array(found.predictions.heatmap[0].float().sigmoid().amax(0))


def cross_modal(sight: Sight, observer: Observer) -> Figure:
    """SimDistill's cross-modal term step by step: LiDAR map, adapted student, object mask, loss of each cell.

    Args:
        sight: what the observer saw.
        observer: with SimDistill's cross-modal term.

    Raises:
        ValueError: it has none.
    """
    context, terms = terms_of(sight, observer, simdistill.masked_difference, "the cross-modal term")
    term = terms[0]
    student, teacher = context.pair(term)
    grid = context.grid_of(student)
    mask, loss = (
        array(simdistill.object_mask(context, grid)[0, 0]),
        array(sight.loss_map(term.name)),
    )
    figure = new_figure(14.0, 4.4)
    axes = list(figure.subplots(1, 4))
    both = {str(term.teacher): norm_map(teacher), f"{term.student}, adapted": norm_map(student)}
    norm = robust_norm(*both.values())
    for ax, (name, values) in zip(axes, both.items(), strict=False):
        shown = on_map(ax, sight, values, grid, name, norm=norm, cmap="viridis")
    colour_bar(axes[:2], shown, "norm over channels", **BELOW)
    top = max(float(mask.max()), 1.0)
    shown = on_map(axes[2], sight, mask, grid, "object mask", norm=Normalize(0, top), cmap="cividis")
    colour_bar(axes[2], shown, "weight (it enters squared)", **{**BELOW, "extend": "neither"})
    norm = robust_norm(loss[loss > 0], np.zeros(1), low=0, high=98)
    shown = on_map(axes[3], sight, loss, grid, f"{term.name}: sum {loss.sum():.3g}", norm=norm, cmap="inferno")
    colour_bar(axes[3], shown, "loss per cell", **{**BELOW, "extend": "max"})
    return figure


def class_errors(teacher: tuple[float, ...] = (0.02, 0.3, 0.9)) -> Figure:
    """SimDistill's class error of one cell against the student's score, as intended and with the second sigmoid.

    Args:
        teacher: the teacher's scores, a line each.
    """
    score = torch.linspace(1e-4, 1 - 1e-4, 400)
    figure = new_figure(11.0, 3.9)
    axes = figure.subplots(1, 2)
    for value, colour in zip(teacher, (OTHERS[1], TRUTH, STUDENT, GREY), strict=False):
        target = torch.full_like(score, value)
        label = f"teacher's score {value:g}"
        intended = simdistill.score_error(score.logit(), target.logit())
        released = simdistill.score_error(score, target)
        for ax, error in zip(axes, (intended, released), strict=True):
            ax.plot(score, error, color=colour, label=label)
            ax.plot([value], [0.0], "o", color=colour, markersize=5)
    for ax, title in zip(axes, ("intended: of scores", "released: of scores taken for logits"), strict=True):
        ax.set(xlabel="student's score", ylabel="error of one cell", xlim=(0, 1), title=title)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 2.0)
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def sampling_offsets(sight: Sight, observer: Observer, at: Sequence[tuple[float, float]] | None = None) -> Figure:
    """Where cells of SimDistill's simulated LiDAR map read it: the learned places of the geometry compensation.

    The student runs again on the sight's batch, and what its compensation computes on the way is taken from it.

    Args:
        sight: of a student with simulated LiDAR.
        observer: that made the sight; holds the student.
        at: places (x, y) in metres whose cells are shown; the centre of the nearest box by default, ten metres ahead
            where there is none.

    Raises:
        ValueError: the student has no geometry compensation in its BEV.
    """
    places, weights = compensation(sight, observer)
    grid = sight.grid
    if at is None:
        centres = sight.sample.boxes.values[:, :2]
        at = [(float(x), float(y)) for x, y in centres[centres.norm(dim=-1).argsort()[:1]]] or [(10.0, 0.0)]
    assert sight.student is not None and sight.student.lidar_bev is not None
    backdrop = norm_map(sight.student.lidar_bev)
    figure = new_figure(13.0, 5.6)
    left, right = figure.subplots(1, 2)
    shown = bev_image(left, backdrop, grid, norm=robust_norm(backdrop), cmap="Greys")
    bev_axes(left, grid, "places that a cell reads; size: weight")
    bev_boxes_on(left, sight.sample.boxes, TRUTH, linewidths=0.8)
    colour_bar(left, shown, "student.lidar_bev, norm over channels", **BELOW)
    columns, rows, inside = grid.locate(torch.tensor(list(at), dtype=torch.float32).reshape(-1, 2))
    for index, (column, row) in enumerate(zip(columns[inside].tolist(), rows[inside].tolist(), strict=True)):
        xy, share = (array(v[row, column].flatten(0, 1)) for v in (grid.to_metres(places), weights))
        colour = ("#D55E00", "#0072B2", "#CC79A7")[index % 3]
        x, y = grid.to_metres(torch.tensor((column + 0.5, row + 0.5))).tolist()
        left.scatter(xy[:, 1], xy[:, 0], s=1000 * share, color=colour, alpha=0.7, linewidths=0, zorder=6)
        text = f"cell at ({x:.0f}, {y:.0f}) m"
        left.scatter([y], [x], marker="s", s=40, color=colour, edgecolors="white", zorder=7, label=text)
    if inside.any():
        left.legend(loc="upper right", fontsize=8, framealpha=0.9).set_zorder(8)
    cells = grid.to_cells(grid.centres())[:, :, None, None]
    reach = ((places - cells).norm(dim=-1) * weights).sum(-1).mean(-1) * grid.cell
    shown = on_map(
        right, sight, array(reach), grid, "how far away a cell reads", norm=robust_norm(array(reach)), cmap="viridis"
    )
    colour_bar(right, shown, "weighted mean distance of the places (m)", **BELOW)
    return figure


def compensation(sight: Sight, observer: Observer) -> tuple[Tensor, Tensor]:
    """What the student's BEV compensation reads: places (column, row) [H, W, heads, points, 2], weights [..., points].

    Raises:
        ValueError: the student has none.
    """
    module = _compensation_of(simulated_lidar(observer))
    kept: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, out, name=name: kept.__setitem__(name, out))
        for name, layer in (("offsets", module.offsets), ("weights", module.weights))
    ]
    try:
        _run(sight, observer)
    finally:
        for hook in hooks:
            hook.remove()
    shape = (*module.size, module.heads, module.points)
    cells = module.cells().view(*module.size, 1, 1, 2)
    weights = kept["weights"][0].float().cpu().view(shape).softmax(-1)
    return cells + kept["offsets"][0].float().cpu().view(*shape, 2), weights
