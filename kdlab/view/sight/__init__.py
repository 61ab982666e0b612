"""What teacher, student and method make of one sample: looked at once, read by every picture and widget.

`observer` looks, `data` is what it saw, `file` keeps it, `match` finds what goes together, `frames` walks through a
data set. What is read from a sight: `maps` of stages, `masks` of terms, `layers` for panels, `cell` for one place.
`look` is the same for one network alone.
"""

from kdlab.view.sight.data import ALL, Live, Sight
from kdlab.view.sight.file import load_sights, save_sights
from kdlab.view.sight.frames import Frames
from kdlab.view.sight.observer import Observer

__all__ = ["ALL", "Frames", "Live", "Observer", "Sight", "load_sights", "save_sights"]
