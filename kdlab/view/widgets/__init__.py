"""Parts of the explorer and the living scene: the canvas in the page, controls, what they say."""
