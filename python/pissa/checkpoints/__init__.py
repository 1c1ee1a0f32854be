"""Whole checkpoints on disk, matrix by matrix: none of them is ever in memory.

`files.source` maps the model's folder that is read.

- `merge_plan`, `trained`, `merge`: a checkpoint with an adapter merged into it
- `planned_file`, `journal`, `output`: a folder that several processes write, and that a killed run goes on with
- `composition`, `plan`: which tensors make the layers of an adapter
- `new_files`, `init`: residuals as a checkpoint, start factors as a LoRA beside it
"""
