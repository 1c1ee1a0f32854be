"""The paper's claims measured again: experiments, each of them a grid of cells, and what evaluates a trained model."""
