"""The paper's own trainings, at its own size: 7 billion parameters and 100,000 examples, DeBERTa on GLUE."""
