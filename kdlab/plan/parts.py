"""The parts of a detector's and of a distillation's step, and what each needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlab.cost import parameters
from kdlab.distill import Distiller, Method, Part, TensorPath
from kdlab.models import Detector
from kdlab.models.camera import CameraEncoder, SimulatedLidar, depth_loss
from kdlab.models.head import focal_sums
from kdlab.models.labels import VALUES, LabelEncoder, LabelMaps
from kdlab.models.lift import depth_bins
from kdlab.plan.measure import PRECISIONS, PartCost, measure
from kdlab.sample import CLASSES

POINTS_PER_SWEEP = 25_000
"""Of a nuScenes sweep, in range."""
CAMERAS = 6
"""Of the nuScenes rig."""
_INDEX = 5 * 8  # bytes of a lift's index per point: cell, source, pixel, seen, seen_cell


class Parts:
    """Iterates over the parts of a detector's step."""

    def __init__(self, detector: Detector, batch: int, trained: bool, side: str = "") -> None:
        self.detector, self.batch, self.trained, self.side = detector, batch, trained, side
        self.shape = detector.grid.shape

    def __iter__(self) -> Iterator[PartCost]:
        detector, config, batch = self.detector, self.detector.config, self.batch
        if detector.camera is not None:
            yield from self._camera(detector.camera)
        if detector.lidar is not None:
            yield from self._lidar()
        fused = detector.fuser if detector.fuser is not None else detector.lidar_project
        widths = [config.bev.channels] if detector.camera is not None else []
        widths += [detector.channels.lidar_bev] if detector.channels.lidar_bev else []
        if detector.fuser is not None or config.modality == "lidar":
            yield self._part("fuser", fused, *((batch, width, *self.shape) for width in widths))
        yield self._part("BEV encoder", detector.encoder, (batch, config.bev.channels, *self.shape))
        stages = [
            (batch, width, *(math.ceil(side / (config.bev.first_stride * 2**i)) for side in self.shape))
            for i, width in enumerate(config.bev.stages)
        ]
        yield self._part("BEV neck", lambda *maps: detector.neck(maps), *stages, modules=[detector.neck])
        yield self._part(
            "head and its loss" if self.trained else "head",
            self._head,
            (batch, config.bev.neck, *self.shape),
            modules=[detector.head],
        )

    def _part(
        self, name: str, run: Callable[..., Any], *shapes: tuple[int, ...], modules: Sequence[nn.Module] | None = None
    ) -> PartCost:
        owned = [run] if modules is None and isinstance(run, nn.Module) else modules or []
        return measure(self.side + name, run, list(shapes), owned, self.trained)

    def _head(self, neck: Tensor) -> Any:
        predictions = self.detector.head(neck)
        if not self.trained:
            return predictions.heatmap, predictions.regression
        maps = predictions.heatmap
        return focal_sums(maps, torch.zeros(maps.shape)), predictions.regression

    def _lidar(self) -> Iterator[PartCost]:
        lidar, config = self.detector.lidar, self.detector.config.lidar
        assert lidar is not None
        points = self.batch * config.sweeps * POINTS_PER_SWEEP
        width = (*config.finer, config.channels)[0]

        def run(cloud: Tensor) -> Tensor:
            features = lidar.first(cloud)
            if lidar.second is not None:
                features = lidar.second(torch.cat((features.relu(), features), 1))
            canvas = features.new_zeros(self.batch, width, *lidar.grid.shape)
            coarse: Tensor = lidar.coarser(canvas)
            return coarse if len(lidar.coarser) else canvas

        layers = [m for m in (lidar.first, lidar.second, lidar.coarser) if m is not None]
        yield self._part("pillars", run, (points, 8), modules=layers)

    def _camera(self, camera: CameraEncoder) -> Iterator[PartCost]:
        config, simulated = camera.config, camera.simulated
        h, w = (side // config.stride for side in config.image_size)
        images, bins = self.batch * CAMERAS, depth_bins(config.depth)
        seen = [(images, config.channels, h, w), (images, 18)]
        seen += [(images, 1, *config.image_size)] if config.lidar_depth else []
        before = [simulated.in_images] if simulated is not None and config.shared_lift else []

        def see(pixels: Tensor) -> Tensor:
            found: Tensor = camera.neck(camera.backbone(pixels))
            return found

        def lift(features: Tensor, entries: Tensor, *lidar: Tensor) -> Any:
            for module in before:
                features = module(features)
            if camera.lidar_depth is not None:
                features = camera.lidar_depth(features, *lidar)
            depth, context = camera.depth_net(features, entries)
            if not (config.depth_supervision and torch.is_grad_enabled()):
                return depth, context
            target = torch.zeros(self.batch, CAMERAS, h, w)
            return depth_loss(depth.unflatten(0, (self.batch, CAMERAS)), target, config.depth), context

        looking = [camera.backbone, camera.neck]
        yield self._by_frame("image backbone and neck", see, (images, 3, *config.image_size), modules=looking)
        lifting = [m for m in (*before, camera.lidar_depth, camera.depth_net) if m is not None]
        yield self._by_frame("depth net", lift, *seen, modules=lifting)
        yield self._lift("lift", images * h * w, bins, config.frames)
        bev = (self.batch, config.context, *self.shape)
        if len(list(camera.refine.children())):
            yield self._by_frame("BEV of a frame", camera.refine, bev, modules=[camera.refine])
        yield self._part("temporal", camera.temporal, (self.batch, config.context * config.frames, *self.shape))
        if simulated is not None and simulated.depth_net is None:
            yield self._part("simulated LiDAR", simulated.in_bev, bev)
        elif simulated is not None:
            yield self._simulated(simulated, seen, bev)
            yield self._lift("simulated LiDAR's lift", images * h * w, bins, 0)  # by the key frame's index

    def _simulated(self, simulated: SimulatedLidar, seen: Sequence[tuple[int, ...]], bev: tuple[int, ...]) -> PartCost:
        """Simulated LiDAR with a lift of its own, that lift left out."""

        def pretend(lifted: Tensor, features: Tensor, entries: Tensor, *lidar: Tensor) -> Any:
            image = simulated.in_images(features)
            if simulated.lidar_depth is not None:
                image = simulated.lidar_depth(image, *lidar)
            assert simulated.depth_net is not None
            return (*simulated.depth_net(image, entries), simulated.in_bev(simulated.refine(lifted)))

        return self._part("simulated LiDAR", pretend, bev, *seen, modules=[simulated])

    def _by_frame(
        self, name: str, run: Callable[..., Any], *shapes: tuple[int, ...], modules: Sequence[nn.Module]
    ) -> PartCost:
        """A part of the key frame, together with that of past frames, which keep nothing without gradient."""
        key, camera = self._part(name, run, *shapes, modules=modules), self.detector.config.camera
        past = camera.frames - 1
        if not past:
            return key
        others = measure(name, run, [(n * past, *rest) for n, *rest in shapes], modules, False)
        share, kept = key.trained / camera.frames, key.kept
        if camera.past_gradient or not self.trained:
            share, kept = key.trained, {p: size * camera.frames for p, size in key.kept.items()}
        passing = key.passing if camera.past_gradient and self.trained else others.passing
        return replace(key, flop=key.flop + others.flop, kept=kept, passing=passing, trained=share)

    def _lift(self, name: str, pixels: int, bins: int, frames: int) -> PartCost:
        """Upper bound: as if all points of the frustums fell into the grid; with indices of as many frames."""
        points, camera = pixels * bins, self.detector.config.camera
        table, cells = 4.0 * pixels * camera.context, 4.0 * self.batch * camera.context * math.prod(self.shape)
        once, past = table + cells + 4.0 * points, max(frames - 1, 0)
        kept = once * (1 + past * camera.past_gradient) if self.trained else cells * (1 + past)
        passing = 0.0 if self.trained and camera.past_gradient else once * past
        return PartCost(
            self.side + name,
            0,
            2.0 * points * camera.context * (1 + past),
            dict.fromkeys(PRECISIONS, _INDEX * points * frames + kept),
            dict.fromkeys(PRECISIONS, passing),
            float(self.trained) / (1 if camera.past_gradient else 1 + past),
        )


def distillation(method: Method, student: Detector, teacher: Detector, batch: int) -> list[PartCost]:
    """The teacher's forward pass, the label encoder's, the adapters' and terms'."""
    found = [*Parts(teacher, batch, trained=False)]
    whole = PartCost(
        "teacher",
        parameters(teacher),
        sum(p.flop for p in found),
        {p: sum(part.kept[p] for part in found) for p in PRECISIONS},
        {p: max(part.passing[p] for part in found) for p in PRECISIONS},
        0.0,
    )
    costs, labels = [whole], None
    for stage in method.stages if method.needs_labels else ():
        labels = stage.build(teacher, method.on)
        assert isinstance(labels, LabelEncoder)
        costs.append(_labels(labels, batch))
    distiller = Distiller(method, student, teacher, labels, grid=student.grid)
    return [*costs, *_terms(method, distiller, student, teacher, batch)]


def _labels(encoder: LabelEncoder, batch: int) -> PartCost:
    shape = encoder.grid.shape

    def run(box: Tensor, label: Tensor) -> Any:
        return encoder.encode(LabelMaps(box, label, torch.ones(batch, *shape, dtype=torch.bool))).stages

    inputs = [(batch, *shape, VALUES), (batch, *shape, len(CLASSES))]
    return measure("label encoder", run, inputs, [encoder], trained=False)


def _terms(
    method: Method, distiller: Distiller, student: Detector, teacher: Detector, batch: int
) -> Iterator[PartCost]:
    """Each comparison of one pair of tensors: its adapter, and two maps of the source's size; all in float32."""
    resized = {a.name for a in method.adapters if a.resize != "no"}
    seen = set()
    for term in method.active:
        pair = (term.student, term.teacher, term.adapter)
        if pair in seen or term.teacher is None:
            continue
        seen.add(pair)
        ours, theirs = TensorPath.parse(term.student), TensorPath.parse(term.teacher)
        width = ours.width(student.channels) or 0
        if isinstance(term.channels, Part):
            width = term.channels.width(width, ours.frames(student.channels))
        adapter = distiller.adapters[term.adapter.replace(".", "/")] if term.adapter else nn.Identity()
        size = _size(theirs, teacher) if term.adapter in resized else None

        def run(maps: Tensor, adapter: nn.Module = adapter, size: tuple[int, int] | None = size) -> Tensor:
            adapted = adapter(maps if size is None else F.interpolate(maps, size, mode="bilinear"))
            error: Tensor = (adapted - torch.zeros(adapted.shape)).square() * torch.ones(1, 1, *adapted.shape[-2:])
            return error

        name = f"{ours.text.removeprefix('student.')} to {theirs.side}"
        shape = (batch, width, *_size(ours, student))
        cost = measure(name, run, [shape], [adapter], trained=True)
        yield replace(cost, kept=dict.fromkeys(PRECISIONS, cost.kept["fp32"]))


def _size(path: TensorPath, detector: Detector) -> tuple[int, int]:
    """Rows and columns of a detector's tensor, or of its label encoder's."""
    config, (height, width) = detector.config, detector.grid.shape
    if path.name in ("image", "depth"):
        return config.camera.image_size[0] // config.camera.stride, config.camera.image_size[1] // config.camera.stride
    if path.name != "stages" or path.index is None:
        return height, width
    stride = config.bev.first_stride * 2 ** (path.index % len(config.bev.stages))
    return math.ceil(height / stride), math.ceil(width / stride)
