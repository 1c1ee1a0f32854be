"""Messages of other packages that would litter the screen, silenced one by one, each with its reason."""

from __future__ import annotations

import logging
import warnings


def silence_third_parties() -> None:
    """To be called before peft and transformers are imported."""
    # peft asks transformers for an attribute that transformers has renamed; nothing is to be done about it here.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # bitsandbytes, which peft imports where it is installed, reports an optional kernel package at every start.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    # Bars that last a tenth of a second ("Loading weights", "Writing model shards") between our own lines.
    transformers_logging.disable_progress_bar()
