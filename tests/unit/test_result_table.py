"""The tables: which rows stand together, what the columns say, and the Markdown form of the same."""

from dataclasses import replace

from qtilt_trainer.evaluate import Record, Regime
from qtilt_trainer.evaluate.grid import GREEDY
from qtilt_trainer.report.plots import frontier_x, kl_name
from qtilt_trainer.result_table import by_regime, markdown_table, result_table

PLAIN, TRUNCATED, NUCLEUS = Regime(1.0, 1.0, 0), Regime(1.0, 1.0, 20), Regime(0.8, 0.9, 0)
CONSTANT = Record(task="t", method="constant", n=300, accuracy=0.0625, low=0.0, high=0.125, text="a | b\n" + "c" * 200)


def reference(regime: Regime, accuracy: float = 0.5) -> Record:
    return Record(
        task="t",
        method="reference",
        n=300,
        accuracy=accuracy,
        low=accuracy - 0.05,
        high=accuracy + 0.05,
        regime=regime.label,
        temperature=regime.temperature,
        top_p=regime.top_p,
        top_k=regime.top_k,
        guidance_top_k=20,
        kl=0.0,
        kl_candidates=0.0,
        tokens=20.0,
        cut=0.25,
        rep_4=0.01,
        distinct_2=0.5,
        samples=1 if regime.is_greedy else 4,
        k=1 if regime.is_greedy else 4,
        maj_at_k=0.75,
        pass_at_k=0.875,
    )


def guided(regime: Regime, inv_eta: float = 10.0, tail: str = "floor", **changes: float) -> Record:
    return replace(
        reference(regime, 0.75),
        method="qsharp",
        inv_eta=inv_eta,
        tail=tail,
        gain=0.25,
        gain_low=-0.125,
        gain_high=0.375,
        kl=7.25,
        kl_candidates=0.5,
        mass=0.75,
        value_model="v@2",
        **changes,
    )


RECORDS = [
    CONSTANT,
    *(reference(regime) for regime in (PLAIN, GREEDY, NUCLEUS)),
    reference(TRUNCATED, 0.625),
    *(guided(regime, inv_eta) for inv_eta in (1.0, 10.0) for regime in (PLAIN, GREEDY)),
    guided(TRUNCATED, tail="mean"),
]


def test_every_table_has_the_reference_its_truncation_and_the_constant_beside_the_guided_policies() -> None:
    plain, greedy, truncated = by_regime(RECORDS)  # Nothing is guided in NUCLEUS.
    assert [table.regime for table in (plain, greedy, truncated)] == [PLAIN, GREEDY, TRUNCATED]
    assert [plain.policy(record) for record in plain.records] == [
        *("reference", "reference, top-k 20", "best constant answer", "Q♯", "Q♯")
    ]
    assert [record.accuracy for record in plain.records] == [0.5, 0.625, 0.0625, 0.75, 0.75]
    assert [record.inv_eta for record in plain.guided] == [1.0, 10.0]
    for table in (greedy, truncated):
        assert table.truncated is None and table.constant is CONSTANT and table.reference.drawn_in == table.regime
    # Its KL to the reference of this regime is not 0, and not measured.
    assert plain.truncated is not None and plain.truncated.kl is plain.truncated.kl_candidates is None


def test_references_alone_have_tables_too() -> None:
    assert [table.regime for table in by_regime([reference(PLAIN), reference(GREEDY)])] == [PLAIN, GREEDY]


def test_the_table_says_what_the_record_says() -> None:
    lines = result_table(RECORDS).split("\n")
    assert lines[0] == "T 1 (300 prompts × 4 completions)"
    assert lines[1].split() == [
        *("policy", "1/η", "tail", "reward", "gain", "KL", "KL", "cand.", "mass", "tokens", "cut", "rep-4", "dist-2"),
        *("maj@4", "pass@4"),
    ]
    assert lines[6].split() == [
        *("Q♯", "10", "floor", "0.750", "[0.700,", "0.800]", "+0.250", "[-0.125,", "+0.375]", "7.25", "0.50", "0.75"),
        *("20.0", "0.25", "0.010", "0.500", "0.750", "0.875"),
    ]
    assert max(map(len, lines[:7])) <= 150
    start = lines.index("greedy (300 prompts)")
    assert "maj" not in lines[start + 1]
    assert f"best constant answer: “a | b⏎{'c' * 114}…”" in lines


def test_columns_are_aligned() -> None:
    lines = result_table([reference(PLAIN), guided(PLAIN), guided(PLAIN, 0.125)]).split("\n")[1:5]
    ends = [line.index(cell) + len(cell) for line, cell in zip(lines, ("1/η", "0.500", "10", "0.125"), strict=True)]
    assert ends[0] == ends[2] == ends[3]
    assert len({len(line) for line in lines}) == 1


def test_degenerate_text_is_marked_and_told() -> None:
    table = result_table([reference(PLAIN), guided(PLAIN, 5.0), guided(PLAIN, 40.0, rep_4=0.5)])
    assert [line.split()[:2] for line in table.split("\n")[3:5]] == [["Q♯", "5"], ["Q♯", "!"]]
    assert "! Q♯, 1/η = 40, tail floor, T 1: repeats itself: rep-4 0.50, the reference 0.01" in table


def test_markdown_has_the_same_cells() -> None:
    text = markdown_table(RECORDS)
    blocks = text.split("\n\n")
    assert blocks[0] == "**t, T 1 (300 prompts × 4 completions)**"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in blocks[1].split("\n")]
    plain = result_table(RECORDS).split("\n")[1:7]
    assert [" ".join(row).split() for row in [rows[0], *rows[2:]]] == [line.split() for line in plain]
    assert len({len(row) for row in rows}) == 1
    assert text.count("\n- !") == 1  # The legend; nothing degenerates.
    assert text.endswith("\n")


def test_the_kl_of_a_frontier_is_that_of_what_is_sampled() -> None:
    regimes = {
        PLAIN: (7.25, "KL to the reference"),
        TRUNCATED: (0.5, "KL among the candidates"),
        Regime(1.0, 1.0, 5): (0.5, "KL among the candidates"),
        Regime(1.0, 1.0, 21): (7.25, "KL before truncation"),
        NUCLEUS: (7.25, "KL before truncation"),
        GREEDY: (7.25, "KL before truncation"),
    }
    for regime, (x, name) in regimes.items():
        (table,) = by_regime([reference(regime), guided(regime)])
        assert (frontier_x(table.guided[0]), frontier_x(table.reference), kl_name(table)) == (x, 0.0, name)
