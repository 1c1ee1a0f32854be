"""The adapted embedding: the linear layer W = weightᵀ [dim, vocabulary] of one-hot vectors."""

from __future__ import annotations

from peft.tuners.lora import Embedding as LoraEmbedding
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  everybody's name for it

from pissa.layers.layer import PissaLayer


class PissaEmbedding(PissaLayer, LoraEmbedding):  # type: ignore[misc]
    """A PissaLayer over nn.Embedding: lora_embedding_A[adapter] is dA [r, vocabulary], lora_embedding_B[adapter] dB
    [dim, r]. A product with A is a look-up of its columns."""

    factor_keys = ("lora_embedding_A", "lora_embedding_B")

    def factor_parameters(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    def change(self, y: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        (da, db), start = self.changed_factors(adapter_name), self.start_of(adapter_name)
        looked_up = F.embedding(x, da.mT, padding_idx=self.base_layer.padding_idx).float()  # no gradient for that row
        change = (F.embedding(x, start.a0.mT) + looked_up) @ db.float().mT + looked_up @ start.b0.mT
        # Gemma's and BART's embeddings multiply what they look up.
        scale: float | Tensor = self.scaling[adapter_name] * getattr(self.base_layer, "embed_scale", 1.0)
        return y + (scale * change).to(y.dtype)
