"""Whole checkpoints on disk, matrix by matrix: none of them is ever in memory. `files.source` maps the folder that is
read.

- `plan`, `output`, `rewrite`: a folder that several processes write from another, and that a killed
  run goes on with
- `split_plan`, `init`: residuals as a checkpoint, start factors as a LoRA beside it
- `packed`, `load`: a PissaModel over the mapped files of such a folder
- `merge_plan`, `trained`, `merge`: a checkpoint with an adapter merged into it
- `budget`, `report`: what a checkpoint holds for PiSSA
"""
