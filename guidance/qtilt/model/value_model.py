"""The value model: a decoder-only backbone and a linear head that predict the return distribution Z(x, y).

Shapes: ``N`` sequences, ``T`` tokens, ``B`` rows, ``K`` candidates, ``A`` logits of one return distribution,
``H`` hidden size, ``V`` vocabulary.

Two parameterisations (paper, section 3; V-type is the better one there):

- V-type reads Z(x, y) from the hidden state *after* y: the head is ``[A, H]``, and K candidates cost K tokens.
- Q-type reads Z(x, ·) for all y from the hidden state *before* y: the head is ``[V·A, H]`` with row ``token·A + atom``.

Trainer and server run this same module. The head's product is computed in float32 whatever the backbone's dtype.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from qtilt.method.distributions import ReturnDistribution
from qtilt.model.low_rank import BaseModel

ValueType = Literal["q", "v"]


class ValueModel(nn.Module):
    """A transformers decoder without its language-model head, and the head for Z.

    backbone: what ``AutoModel.from_pretrained`` gives. type: ``q`` or ``v``. head: ``nn.Linear(H, A)`` for V-type,
    ``nn.Linear(H, V·A)`` for Q-type, V being the rows of the backbone's embedding.

    Raises ValueError when the head's shape doesn't fit.
    """

    def __init__(
        self, backbone: PreTrainedModel, type: ValueType, distribution: ReturnDistribution, head: nn.Linear
    ) -> None:
        super().__init__()
        if type not in get_args(ValueType):
            raise ValueError(f"value model type is {type!r}, allowed: {', '.join(get_args(ValueType))}")
        self.backbone = backbone
        self.type: ValueType = type  # type: ignore[assignment]  # torch's Module has a method of that name
        self.distribution = distribution
        self.head = head
        self.base: BaseModel | None = None
        """What a low-rank model was merged from and shares weights with; held as long as the model is."""
        rows = head_rows(type, distribution, self.vocab_size)
        if tuple(head.weight.shape) != (rows, self.hidden_size):
            raise ValueError(f"head weight is {list(head.weight.shape)}, expected [{rows}, {self.hidden_size}]")

    @classmethod
    def from_backbone(
        cls, backbone: PreTrainedModel, type: ValueType, distribution: ReturnDistribution, head_std: float = 0.0
    ) -> "ValueModel":
        """A new head over ``backbone``: normal weights of ``head_std``, zero bias. 0 gives a constant value."""
        hidden_size = backbone.config.get_text_config().hidden_size
        vocab_size = embedding_rows(backbone)
        head = nn.Linear(hidden_size, head_rows(type, distribution, vocab_size), dtype=backbone.dtype)
        nn.init.normal_(head.weight, std=head_std)
        nn.init.zeros_(head.bias)
        return cls(backbone, type, distribution, head)

    @property
    def vocab_size(self) -> int:
        """Rows of the backbone's embedding: the token ids the model can read and score."""
        return embedding_rows(self.backbone)

    @property
    def hidden_size(self) -> int:
        return int(self.backbone.config.get_text_config().hidden_size)

    @property
    def max_positions(self) -> int:
        """The longest sequence, candidate included, that the backbone's positions cover."""
        return int(self.backbone.config.get_text_config().max_position_embeddings)

    def taken_logits(self, input_ids_NT: Tensor, attention_mask_NT: Tensor | None = None) -> Tensor:
        """Logits of Z(x_t, y_t) for the token y_t at each position given the tokens before it: float32 ``[N, T, A]``.

        ``attention_mask_NT`` is 1 for tokens and 0 for padding on the right. Q-type has no state before position 0:
        its entry there is zeros.
        """
        outputs = self.backbone(input_ids=input_ids_NT, attention_mask=attention_mask_NT, use_cache=False)
        hidden_NTH = outputs.last_hidden_state
        with torch.autocast(hidden_NTH.device.type, enabled=False):
            return self._taken_head_logits(hidden_NTH, input_ids_NT)

    def _taken_head_logits(self, hidden_NTH: Tensor, input_ids_NT: Tensor) -> Tensor:
        if self.type == "v":
            return self.head_logits(hidden_NTH)
        before_NTH = hidden_NTH[:, :-1].flatten(0, 1)
        taken_NT1 = input_ids_NT[:, 1:].flatten().unsqueeze(-1)
        logits_NTA = self.head_logits(before_NTH, taken_NT1).unflatten(0, (input_ids_NT.shape[0], -1)).squeeze(2)
        return torch.cat([torch.zeros_like(logits_NTA[:, :1]), logits_NTA], dim=1)

    def head_logits(self, hidden: Tensor, candidates_BK: Tensor | None = None) -> Tensor:
        """Logits of Z from hidden states, float32.

        V-type: ``hidden [..., H]`` after each candidate → ``[..., A]``. Q-type: ``hidden_BH`` before the candidates and
        ``candidates_BK`` → ``[B, K, A]``, computed from the candidates' rows of the head only.
        """
        weight, bias = self.head.weight, self.head.bias
        if self.type == "v":
            return linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        assert candidates_BK is not None, "a Q-type head needs the candidates"
        atoms = self.distribution.num_logits
        rows_BKAH = embedding(candidates_BK, weight.view(self.vocab_size, -1)).unflatten(-1, (atoms, -1))
        logits_BKA = torch.einsum("bh,bkah->bka", hidden.float(), rows_BKAH.float())
        return logits_BKA if bias is None else logits_BKA + bias.view(-1, atoms)[candidates_BK].float()


def embedding_rows(backbone: PreTrainedModel) -> int:
    """V: the token ids that the backbone can read."""
    weight = backbone.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.shape[0]


def head_rows(type: ValueType, distribution: ReturnDistribution, vocab_size: int) -> int:
    """Rows of the head's weight: A for V-type, V·A for Q-type."""
    return distribution.num_logits * (vocab_size if type == "q" else 1)
