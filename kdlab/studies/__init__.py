"""Studies: many runs from one description, and a verdict on each change."""
