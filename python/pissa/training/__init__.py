"""What training a wrapped model needs beside the model: a learning rate, a faster step, the adapter in memory for an
engine that generates."""
