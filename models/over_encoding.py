"""OverEncoding: n-gram rows averaged into the token embedding (Huang et al. 2025, arXiv 2501.16975).

The baseline of the Engram paper (arXiv 2601.07372, 3.2): memory at the input of the model and nowhere else, no gate.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.ngram_hash import NgramRows


@dataclass
class OverEncodingConfig(NgramRows):
    """Shape of the n-gram embeddings; the paper's symbols in brackets.

    The hash is Engram's, with its primes and its document starts, so that the two memories differ only in where rows
    enter the model and how. The paper's own index is the n-gram as a number in base V modulo the table size; both
    spread n-grams over rows as if at random.
    """

    max_ngram_size: int = 3  # orders 2..max_ngram_size are looked up [n]
    num_hash_heads: int = 4  # tables per order [k]
    d_memory: int = 128  # width of all rows of a token together; the paper has d_model (n - 1) / n
    table_size: int = 10_000  # rows per head before rounding up to a prime [m]; 1 = one row per head (control)
    hash_seed: int = 0  # seed of the hash multipliers
    compress: bool = False  # n-grams of the tokens themselves, as published; True: of normalised text, as Engram
    shuffled: bool = False  # each sequence reads its neighbour's rows (control); see `NgramHasher`

    def __post_init__(self) -> None:
        self.check_rows("over_encoding")

    @property
    def layers(self) -> list[int]:
        """The one table has the key 0, as it is read where layer 0 begins."""
        return [0]


class OverEncoding(nn.Module):
    """h_t = ( E[x_t] + sum over orders n and heads k of W_{n,k} e_{t,n,k} ) / (1 + R).

    "Averaged with the vocabulary embedding" (arXiv 2601.07372, 3.2); rows with a projection each are the form in which
    an independent implementation (Marin) gives OE. The original text was not at hand to compare.

    With projections W_{n,k} and narrow rows, not with rows as wide as the model: so published, and a row then has the
    width of an Engram row, so that equally large tables have equally many rows and the same traffic. All W lie side by
    side in one matrix, which turns the sum into one matmul over the concatenated rows.
    """

    def __init__(self, cfg: OverEncodingConfig, d_model: int):
        super().__init__()
        self.num_terms = 1 + cfg.num_rows_per_token
        self.projection = nn.Linear(cfg.d_memory, d_model, bias=False)

    def forward(self, embedded: Tensor, rows: Tensor) -> Tensor:
        """Args: embedded (B, S, D), the token embeddings; rows (B, S, R, M). Returns (B, S, D)."""
        return (embedded + self.projection(rows.flatten(2))) / self.num_terms
