"""Whole checkpoints on disk, matrix by matrix: none of them is ever in memory. Errors are those of `files`.

- `output`, `rewrite`: a folder that several processes write from another, and that a killed run goes on with
- `init`: residuals as a checkpoint, start factors as a LoRA beside it
- `load`: a PissaModel over the mapped files of such a folder
- `trained`, `merge`: a checkpoint with an adapter merged into it
- `budget`, `report`: what a checkpoint holds for PiSSA
"""
