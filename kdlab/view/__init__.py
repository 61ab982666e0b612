"""Pictures: pure functions from data to matplotlib figures, and the widgets that drive them."""
