"""Pictures and widgets. Figures are pure functions from data to a matplotlib Figure; widgets only drive them.

Where things are:

* what all pictures share: `style`; lines of code beside a formula: `source`
* sensors and data: `cameras`, `sensing`, `sweeps`, `scene3d` (drawn by `scene3d_draw`)
* detectors from inside: `bev`, `pillars`, `centres`, `depths`, `lifting`, `temporal`
* methods: `diagram`, `regions`, `methods` (UniDistill, DistillBEV), `simulated` (SimDistill), `labels` and `told`
  (LabelDistill), `effects`
* trainings and results: `curves`, `timelapse`, `lapse_terms`, `evaluation`, `matched`, `studies`, `seeds`
* one sample as teacher, student and method see it: `look` (one network), `sight` (all of them; with `sight_data`,
  `sight_file`, `frames`, `match`, `masks`); what a panel shows of it: `layers`; what is known of a cell: `cell`,
  `closeup`
* widgets: `explorer` (with `album`, `controls`, `readout`) and `living` (with `living_controls`, `living_words`,
  `before_after`), both on `canvas` and `background`; `replay` writes the same as one page
"""
