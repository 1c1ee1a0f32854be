"""How many alternations of SVD and quantisation a start should take: errors of weights, and losses after training."""
