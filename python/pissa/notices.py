"""The warnings of this package, one class each. A filter names the class::

    from pissa import notices

    warnings.simplefilter("ignore", notices.InexactLoraWarning)

All of them are UserWarnings.
"""

from __future__ import annotations


class PissaWarning(UserWarning):
    """Any warning of this package."""


class AllLinearWarning(PissaWarning):
    """With target_modules="all-linear", some layers got a lower rank or were left out."""


class TiedWeightWarning(PissaWarning):
    """A weight stays dense, because another module shares it."""


class RequantizedWarning(PissaWarning):
    """Weights that are already quantised are quantised a second time."""


class InexactLoraWarning(PissaWarning):
    """On the unmodified base, the plain LoRA is only approximately the function that was trained."""


class ReplacedLoraWarning(PissaWarning):
    """In the folder of an adapter, another program has replaced the plain LoRA, so the folder counts as that LoRA."""


class NoEmbeddingsWarning(PissaWarning):
    """The embeddings were to be saved, but the model has none that can be identified."""


class OtherDtypeWarning(PissaWarning):
    """The base is in a dtype that does not hold the values that the adapter was trained on."""


class OtherRoundingWarning(PissaWarning):
    """The residual differs in some bits from that of the training, because this machine rounds differently."""


class UnseenBaseWarning(PissaWarning):
    """The model that an adapter names as its base is not here, so it is unknown whether that is a residual."""


class NotTakenOverWarning(PissaWarning):
    """With `pissa.integrations.peft.enable()`, an adapter stays PEFT's own, which is slower or changes the base."""


class PrecisionWarning(PissaWarning):
    """Products of integers were asked for, and here all products are of floating-point numbers."""


class InstructionSetWarning(PissaWarning):
    """The processor supports a fast instruction set that failed its self-test, so a slower one is used."""


class NoEndTokenWarning(PissaWarning):
    """The tokenizer of a GGUF file has no token that ends an answer."""


class CompositeWarning(PissaWarning):
    """On this device PyTorch's operations compute the layers, more slowly than our kernels would."""
