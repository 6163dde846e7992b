"""PhotoShapes, a data set made on the spot, results on it, and the demo."""
