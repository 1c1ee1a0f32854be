"""Whole checkpoints on disk, processed matrix by matrix, so that none is ever in memory. Errors are those of
`containers`.

- `output`, `rewrite`: a folder that several processes write from another, and that a restarted run continues
- `init`: writes residuals as a checkpoint, with the start factors as a LoRA in it
- `load`: a PissaModel over the mapped files of such a folder
- `trained`, `merge`: a checkpoint with an adapter merged into it
- `training_memory`: what a training step takes
"""
