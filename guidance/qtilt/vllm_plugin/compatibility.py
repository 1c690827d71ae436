"""Does a value model fit the reference model that is served? Imports no vLLM: the launcher asks first."""

from dataclasses import dataclass
from pathlib import Path

from qtilt.model.checkpoint import Manifest, TokenizerFingerprint, check_same_ordinary_tokens


@dataclass(frozen=True)
class Reference:
    """What of the reference model a value model must fit.

    vocab_size: columns of its logits, padding included. max_model_len: longest sequence served, in tokens.
    """

    tokenizer: TokenizerFingerprint
    vocab_size: int
    max_model_len: int


def check_fits_reference(manifest: Manifest, directory: Path, reference: Reference) -> list[str]:
    """Raise ValueError, in one line that says what to do, unless the value model can guide the reference.

    Returns warnings, one line each: differences that are allowed.
    """
    check_same_ordinary_tokens(manifest.tokenizer, reference.tokenizer, directory)
    if manifest.max_positions < reference.max_model_len:
        raise ValueError(
            f"{directory}: the value model covers {manifest.max_positions} positions, max_model_len is "
            f"{reference.max_model_len}: lower --max-model-len or take a backbone with more positions"
        )
    if manifest.tokenizer.added == reference.tokenizer.added:
        return []
    differing = set(manifest.tokenizer.added.items()) ^ set(reference.tokenizer.added.items())
    names = sorted({token for token, _ in differing})
    return [
        f"{directory}: added tokens differ from the reference's: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
    ]


def scorable_tokens(manifest: Manifest, reference: Reference) -> int:
    """Ids below this are scored: tokens that both tokenizers and both tables have, no padding rows."""
    return min(manifest.vocab_size, reference.vocab_size, _id_range(manifest.tokenizer), _id_range(reference.tokenizer))


def _id_range(tokenizer: TokenizerFingerprint) -> int:
    # Added tokens need not follow the ordinary ones without a gap.
    return max([tokenizer.token_count, *(index + 1 for index in tokenizer.added.values())])
