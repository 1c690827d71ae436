"""The method on trees small enough to enumerate: with the true Z, the tilt is the optimum it claims to be."""

import itertools
import math

import pytest
import torch

from qtilt.distributions import Bernoulli, Categorical
from qtilt.tilt import divergence, drops, lowest_offset, offsets, reference_mass, tilt_, top_candidates

VOCABULARY, HORIZON = 3, 3
ATOMS = Categorical(low=-1.0, high=2.0, atoms=4)


def tilted_step(reference: list[float], distribution, value_logits: list[list[float]], eta: float, method: str):
    """One step of the code under test: (probabilities, KL in nats) from reference probabilities and Z per token."""
    logits_BV = torch.tensor([reference], dtype=torch.float64).log()
    inv_eta_B = torch.tensor([1 / eta], dtype=torch.float64)
    candidates = top_candidates(logits_BV, len(reference), scorable=len(reference))
    by_rank_BKA = torch.tensor([value_logits], dtype=torch.float64)[:, candidates.token_ids_BK[0]]
    offsets_BK = offsets(distribution, by_rank_BKA, inv_eta_B, method)
    floor_B, temperature_B = lowest_offset(distribution, inv_eta_B), torch.ones(1)
    mass = reference_mass(logits_BV, candidates, temperature_B)
    dropped = drops(mass, candidates.valid_BK, offsets_BK, floor_B, "floor")
    tilt_(logits_BV, candidates, dropped, temperature_B)
    return logits_BV[0].softmax(-1).tolist(), divergence(mass, dropped)[0, 0].item()


def random_tree(seed: int):
    """Reference probabilities for every prefix and a reward on an atom for every full sequence."""
    generator = torch.Generator().manual_seed(seed)
    reference, reward = {}, {}
    for length in range(HORIZON):
        for prefix in itertools.product(range(VOCABULARY), repeat=length):
            reference[prefix] = torch.randn(VOCABULARY, generator=generator).double().softmax(-1).tolist()
    for sequence in itertools.product(range(VOCABULARY), repeat=HORIZON):
        reward[sequence] = float(torch.randint(-1, 3, (), generator=generator))
    return reference, reward


def return_pmf(prefix: tuple[int, ...], reference, reward) -> list[float]:
    """Z(prefix): the exact law of the return when the reference completes, on the four atoms."""
    pmf = [0.0] * ATOMS.atoms
    for tail in itertools.product(range(VOCABULARY), repeat=HORIZON - len(prefix)):
        probability = math.prod(reference[(*prefix, *tail[:i])][token] for i, token in enumerate(tail))
        pmf[int(reward[(*prefix, *tail)]) + 1] += probability
    return pmf


def optimal_soft_value(prefix: tuple[int, ...], reference, reward, eta: float) -> float:
    """V*(x) by backward recursion on the KL-regularised objective: η ln Σ_y π_ref(y|x) exp(V*(xy)/η)."""
    if len(prefix) == HORIZON:
        return reward[prefix]
    total = sum(
        p * math.exp(optimal_soft_value((*prefix, y), reference, reward, eta) / eta)
        for y, p in enumerate(reference[prefix])
    )
    return eta * math.log(total)


@pytest.mark.parametrize("eta", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_tilted_policy_is_the_optimum_found_by_dynamic_programming(seed, eta):
    reference, reward = random_tree(seed)
    for prefix, probabilities in reference.items():
        value_logits = [
            [math.log(max(p, 1e-300)) for p in return_pmf((*prefix, y), reference, reward)] for y in range(VOCABULARY)
        ]
        got, _ = tilted_step(probabilities, ATOMS, value_logits, eta, "qsharp")
        soft = [optimal_soft_value((*prefix, y), reference, reward, eta) / eta for y in range(VOCABULARY)]
        weights = [p * math.exp(q - max(soft)) for p, q in zip(probabilities, soft, strict=True)]
        assert got == pytest.approx([w / sum(weights) for w in weights], abs=1e-9)


@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_no_other_policy_has_a_higher_kl_regularised_objective(eta):
    """E[R] − η·KL of the tilted policy equals V*(root) and beats CD, the reference and random perturbations."""
    reference, reward = random_tree(seed=7)

    def policy(method: str):
        return {
            prefix: tilted_step(
                p,
                ATOMS,
                [[math.log(max(q, 1e-300)) for q in return_pmf((*prefix, y), reference, reward)] for y in range(3)],
                eta,
                method,
            )[0]
            for prefix, p in reference.items()
        }

    def objective(candidate) -> float:
        total = 0.0
        for sequence, value in reward.items():
            prefixes = [sequence[:i] for i in range(HORIZON)]
            p = math.prod(candidate[x][y] for x, y in zip(prefixes, sequence, strict=True))
            q = math.prod(reference[x][y] for x, y in zip(prefixes, sequence, strict=True))
            if p > 0:
                total += p * (value - eta * math.log(p / q))
        return total

    best = objective(policy("qsharp"))
    assert best == pytest.approx(optimal_soft_value((), reference, reward, eta), abs=1e-9)
    assert best > objective(policy("cd"))
    assert best > objective(reference)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noisy = {
            x: torch.tensor(p).double().log().add(0.3 * torch.randn(3, generator=generator)).softmax(-1).tolist()
            for x, p in policy("qsharp").items()
        }
        assert objective(noisy) < best


@pytest.mark.parametrize("p_left", [0.5, 0.9, 0.99])
def test_on_the_two_leaf_tree_cd_goes_left_and_qsharp_goes_right(p_left):
    """Figure 4: left pays 0.1 surely; right pays 1 with probability 0.05. Theorems 4.1 and 4.2, η → 0."""
    certain_tenth = [-500.0, 0.0] + [-500.0] * 9  # atoms 0, 0.1, …, 1
    one_in_twenty = [math.log(0.95)] + [-500.0] * 9 + [math.log(0.05)]
    root, distribution = [p_left, 1 - p_left], Categorical(0.0, 1.0, 11)

    for eta in (0.1, 0.01, 0.002):
        (left, right), kl = tilted_step(root, distribution, [certain_tenth, one_in_twenty], eta, "qsharp")
        weight_left = p_left * math.exp((0.1 - 1) / eta)
        weight_right = (1 - p_left) * (0.05 + 0.95 * math.exp(-1 / eta))
        assert left == pytest.approx(weight_left / (weight_left + weight_right), abs=1e-9)
        expected_kl = sum(p * math.log(p / q) for p, q in zip((left, right), root, strict=True) if p > 0)
        assert kl == pytest.approx(expected_kl, abs=1e-5)
    assert right == pytest.approx(1.0, abs=1e-9)

    (_, leaf_one), _ = tilted_step([0.95, 0.05], Bernoulli(), [[-100.0], [100.0]], 0.002, "qsharp")
    assert leaf_one == pytest.approx(1.0, abs=1e-9)  # and then on to the leaf with reward 1

    (left, right), kl = tilted_step(root, distribution, [certain_tenth, one_in_twenty], 0.002, "cd")
    assert left == pytest.approx(1.0, abs=1e-9)
    assert kl == pytest.approx(math.log(1 / p_left), abs=1e-6)
