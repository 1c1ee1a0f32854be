"""Training data of the paper in the formats that it is published in."""
