"""What a trained model can do: problems of arithmetic, code, conversation and understanding, each with its metric."""
