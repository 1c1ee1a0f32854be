"""What a trained model can do: benchmarks of the paper, each scored by the library that keeps its metric."""
