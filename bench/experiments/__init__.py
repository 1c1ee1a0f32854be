"""The experiments: the claims of the paper, measured with every method at its best rate."""
