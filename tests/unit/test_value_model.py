"""The value model against hidden states taken from the backbone one prefix at a time."""

import pytest
import torch
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from qtilt.distributions import Bernoulli, Categorical
from qtilt.value_model import ValueModel

VOCABULARY, HIDDEN = 17, 16


def llama() -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def gpt2() -> GPT2Model:
    torch.manual_seed(0)
    return GPT2Model(GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_positions=64)).eval()


def last_hidden(backbone, tokens: list[int]) -> torch.Tensor:
    return backbone(torch.tensor([tokens])).last_hidden_state[0, -1]


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(0.0, 1.0, 3)], ids=["bernoulli", "categorical"])
@pytest.mark.parametrize("make_backbone", [llama, gpt2])
@pytest.mark.parametrize("type", ["q", "v"])
@torch.no_grad()
def test_taken_logits_read_the_documented_head_rows(type, make_backbone, distribution):
    model = ValueModel.from_backbone(make_backbone(), type, distribution, head_std=0.5)
    torch.nn.init.normal_(model.head.bias)
    atoms, sequence = distribution.num_logits, [3, 1, 4, 1, 5]
    got_TA = model.taken_logits(torch.tensor([sequence]))[0]
    for t in range(1, len(sequence)):
        if type == "v":
            rows, prefix = slice(0, atoms), sequence[: t + 1]
        else:
            rows, prefix = slice(sequence[t] * atoms, (sequence[t] + 1) * atoms), sequence[:t]
        expected_A = model.head.weight[rows] @ last_hidden(model.backbone, prefix) + model.head.bias[rows]
        torch.testing.assert_close(got_TA[t], expected_A, atol=1e-5, rtol=1e-5)
    if type == "q":
        assert got_TA[0].tolist() == [0.0] * atoms


@pytest.mark.parametrize("type", ["q", "v"])
@torch.no_grad()
def test_padding_on_the_right_changes_nothing(type):
    model = ValueModel.from_backbone(llama(), type, Bernoulli(), head_std=0.5)
    padded = model.taken_logits(torch.tensor([[3, 1, 4, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]]))
    torch.testing.assert_close(padded[:, :3], model.taken_logits(torch.tensor([[3, 1, 4]])), atol=1e-5, rtol=1e-5)


def test_a_zero_head_predicts_a_constant():
    model = ValueModel.from_backbone(llama(), "v", Bernoulli())
    assert model.taken_logits(torch.tensor([[1, 2, 3]])).flatten().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("type", ["q", "v"])
def test_gradients_reach_backbone_and_head(type):
    model = ValueModel.from_backbone(llama(), type, Bernoulli(), head_std=0.5)
    model.taken_logits(torch.tensor([[1, 2, 3]])).square().sum().backward()
    assert model.head.weight.grad is not None and model.head.weight.grad.abs().sum() > 0
    assert model.backbone.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_head_of_the_wrong_shape_or_type_is_refused():
    with pytest.raises(ValueError, match="head weight"):
        ValueModel(llama(), "q", Bernoulli(), torch.nn.Linear(HIDDEN, VOCABULARY - 1))
    with pytest.raises(ValueError, match="type"):
        ValueModel(llama(), "w", Bernoulli(), torch.nn.Linear(HIDDEN, 1))
