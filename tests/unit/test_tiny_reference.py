"""The tiny references: their tokenizer, their chat template, and that training teaches the texts it was given."""

import json
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tiny_reference import (
    SERVABLE_HEAD_DIM,
    ReferenceConfig,
    build_tokenizer,
    prompt_token_ids,
    train_reference,
    with_servable_heads,
)
from train_reference import main as train_reference_command

ALPHABET = [*"0123456789+=\n", "\\boxed"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(ALPHABET)


def test_every_symbol_is_one_token_and_decoding_gives_the_text_back(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "12+3=15\n\\boxed15"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == 8 + 1 + 2
    assert tokenizer.decode(ids) == text


def test_a_token_at_a_time_decodes_to_the_same_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("1+1=2\n", add_special_tokens=False)["input_ids"]
    assert "".join(tokenizer.decode([token]) for token in ids) == "1+1=2\n"


def test_text_outside_the_alphabet_is_unknown_not_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("1 z", add_special_tokens=False)["input_ids"]
    assert ids[1:] == [tokenizer.unk_token_id] * 2


def test_prompts_begin_with_the_start_token_once(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = prompt_token_ids(tokenizer, "1+1")
    chat = prompt_token_ids(tokenizer, [{"role": "user", "content": "1+1"}])
    assert tokenizer.convert_ids_to_tokens(plain) == ["<bos>", "1", "+", "1"]
    assert tokenizer.convert_ids_to_tokens(chat) == ["<bos>", "<user>", "1", "+", "1", "<assistant>"]


def test_earlier_turns_of_a_conversation_end_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user")]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><user>1<assistant>1<eos><user>1<assistant>"


@pytest.mark.parametrize("alphabet", [[], ["a", ""], ["a", "<eos>"]])
def test_an_alphabet_that_makes_no_tokenizer_is_refused(alphabet: list[str]) -> None:
    with pytest.raises(ValueError, match="alphabet"):
        build_tokenizer(alphabet)


@dataclass
class CountingTask:
    """Completions continue the prompt's digit: 3 -> 45."""

    name: str = "counting"
    alphabet: list[str] = field(default_factory=lambda: list("0123456789"))

    def reference_texts(self, rng: random.Random, count: int) -> list[tuple[str, str]]:
        starts = [rng.randrange(8) for _ in range(count)]
        return [(str(start), f"{start + 1}{start + 2}") for start in starts]


def test_a_trained_reference_is_a_plain_checkpoint_that_learned_its_texts(tmp_path: Path) -> None:
    config = ReferenceConfig(steps=150, batch_size=32, hidden=32, layers=1, heads=1, intermediate=32, max_positions=8)
    record = train_reference(CountingTask(), config, tmp_path / "reference")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reference")
    ids = torch.tensor([prompt_token_ids(tokenizer, "3")])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert tokenizer.convert_ids_to_tokens(output[0]) == ["<bos>", "3", "4", "5", "<eos>"]
    assert json.loads((tmp_path / "reference" / "training.json").read_text()) == record
    assert record["final_loss"] < 0.1


def test_filling_heads_up_for_the_server_changes_no_logit() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.5,
        )
    ).eval()
    ids = torch.randint(20, (3, 60))
    widened = with_servable_heads(model).eval()
    assert (model.config.head_dim, widened.config.head_dim) == (8, SERVABLE_HEAD_DIM)
    with torch.no_grad():
        torch.testing.assert_close(widened(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_training_twice_gives_the_same_weights(tmp_path: Path) -> None:
    config = ReferenceConfig(steps=3, batch_size=8, hidden=32, layers=1, heads=1, intermediate=32, max_positions=8)
    for name in ("first", "second"):
        train_reference(CountingTask(), config, tmp_path / name)
    first, second = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert first == second


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": float("nan")}, {"heads": 0}, {"hidden": 30}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ReferenceConfig(**wrong)


def test_the_script_trains_the_reference_of_the_task_that_a_configuration_names(tmp_path: Path) -> None:
    toys = Path(__file__).parents[2] / "examples" / "toys"
    config = tmp_path / "run.toml"
    config.write_text(f'[task]\nname = "{toys}/star_graph.py:StarGraph"\ndegree = 3\n')
    sizes = ["--hidden=16", "--heads=1", "--layers=1", "--intermediate=16", "--steps=2", "--batch-size=4"]
    out = tmp_path / "reference"
    command = [sys.executable, toys / "train_reference.py", config, "--out", out, *sizes]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    made = json.loads((out / "training.json").read_text())
    assert (made["task"], made["config"]["steps"], made["config"]["hidden"]) == ("star_graph", 2, 16)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ('[task]\nname = "star_graph:StarGraph"', ["--steps=0"], "steps must be at least 1, got 0"),
        ("", [], "the table [task] is required"),
        ('[task]\nname = "letters:Letters"', [], "task letters has no reference_texts"),
    ],
)
def test_bad_input_of_the_script_is_one_line(
    text: str, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert train_reference_command([str(tmp_path / "run.toml"), "--out", str(tmp_path / "x"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
