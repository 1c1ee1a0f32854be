"""What every export reports."""

from __future__ import annotations

from typing import NamedTuple


class Exported(NamedTuple):
    """What an export has done."""

    what: str
    """What the adapter is, in words."""
    layers: int
    """Whose weights the adapter changes."""
    written: str
    """What has been written, in words."""
    bytes_written: int
    """Of all files together."""
    load: str
    """How the result is loaded, as a line of Python or of a shell."""
    error: float = 0.0
    """‖W - W'‖ / ‖W'‖ over the layers whose weight W is not, up to float32, the one that was trained, W'."""
    worst: str | None = None
    """The layer, or the stack of experts, of the largest error; None if there is none."""
    error_of_worst: float = 0.0
    """Of that layer alone."""
    mean_error: float = 0.0
    """Of the layers, each by itself."""
