"""Pictures and widgets. Figures are pure functions from data to a matplotlib Figure; widgets only drive them.

Where things are; imports go from the end of this list to its beginning:

* `style`: what all pictures share; `source`: lines of code beside a formula
* `sight`: one sample as teacher, student and method see it, kept as data; nothing is drawn there
* `sensors`: cameras, points, frames, sweeps
* `networks`: BEV maps and boxes, pillars, centres, depths, lifting, past frames
* `methods`: diagram, regions and effects of any method, then a module for each of the four
* `results`: curves, trainings in pictures, evaluations, studies, seeds
* `widgets`: parts of the two below
* `explorer`, `living`: the widgets themselves; `replay` writes the explorer as one page without a kernel; `scene3d`
  (drawn by `scene3d_draw`) shows points, boxes and cameras in three dimensions
"""
