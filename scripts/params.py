"""Parameters, FLOPs and bytes per device of a model, beside what its paper prints.

    python -m scripts.params engram_27b [--zero 1 --world-size 64 --expert-parallel 8 --table-shards 64]
                                        [--micro-batch 1 --checkpointing full]
    python -m scripts.params --all

Everything comes from shapes: the module is built on torch's meta device, no preset needs its memory. Activations are
what autograd keeps on a GPU in bf16 (models/activations.py), of routed experts in the Triton kernels, or in grouped_mm
where moe.expert_kernel says so. Buffers within an operation, gradients of activations, buffers of communication and
what the allocator cannot use again come on top.
"""

import argparse
import sys
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from models.accounting import ParameterCounts, count_parameters, flops_per_token
from models.transformer import ActivationCheckpointing, TransformerConfig
from train.compose import compose
from train.config import Config
from train.footprint import Footprint, Layout, activations, footprints, meta_model, rows_elsewhere

ENGRAM = "arXiv 2601.07372"
DEEPSEEKMOE = "arXiv 2401.06066"
MHC = "arXiv 2512.24880"


@dataclass(frozen=True)
class Figure:
    """One number that a paper prints, and the way of counting in which it prints it."""

    what: str
    printed: str  # as printed, e.g. "26.7B"
    counted: str  # key of `conventions`
    source: str

    @property
    def value(self) -> float:
        """Parameters."""
        return float(self.printed[:-1]) * {"B": 1e9, "M": 1e6}[self.printed[-1]]

    def agrees(self, ours: float) -> bool:
        """Within 1 %, or equal to the printed digits once rounded to them."""
        unit = {"B": 1e9, "M": 1e6}[self.printed[-1]]
        digits = len(self.printed[:-1].partition(".")[2])
        return abs(ours / self.value - 1) <= 0.01 or round(ours / unit, digits) == round(self.value / unit, digits)


PAPERS: dict[str, list[Figure]] = {
    "dense_4b": [
        Figure("total", "4.1B", "with head", f"{ENGRAM}, table 5"),
        Figure("active", "3.8B", "active", f"{ENGRAM}, table 5"),
    ],
    "moe_27b": [
        Figure("total", "26.7B", "with head", f"{ENGRAM}, table 5"),
        Figure("active", "3.8B", "active", f"{ENGRAM}, table 5"),
        Figure("total", "27.0B", "everything", f"{MHC}, table 5"),
        Figure("active", "4.14B", "active with head", f"{MHC}, table 5"),
    ],
    "engram_27b": [
        Figure("total", "26.7B", "with head", f"{ENGRAM}, table 5"),
        Figure("active", "3.8B", "active", f"{ENGRAM}, table 5"),
        Figure("memory", "5.79B", "memory", f"{ENGRAM}, table 5, rows x heads x width"),
    ],
    "engram_40b": [
        Figure("total", "39.5B", "with head", f"{ENGRAM}, table 5"),
        Figure("active", "3.8B", "active", f"{ENGRAM}, table 5"),
        Figure("memory", "18.53B", "memory", f"{ENGRAM}, table 5, rows x heads x width"),
    ],
    "base_2e20": [
        Figure("total", "5.7B", "without vocabulary", f"{ENGRAM}, 3.1"),
        Figure("active", "568M", "active", f"{ENGRAM}, 3.1"),
    ],
    "base_6e20": [
        Figure("total", "9.9B", "without vocabulary", f"{ENGRAM}, 3.1"),
        Figure("active", "993M", "active", f"{ENGRAM}, 3.1"),
    ],
    "deepseekmoe_2b": [
        Figure("total", "2.0B", "everything", f"{DEEPSEEKMOE}, table 1"),
        Figure("active", "0.3B", "active with vocabulary", f"{DEEPSEEKMOE}, table 1"),
    ],
    "deepseekmoe_16b": [
        Figure("total", "16.4B", "everything", f"{DEEPSEEKMOE}, table 7"),
        Figure("active", "2.8B", "active with vocabulary", f"{DEEPSEEKMOE}, table 7"),
    ],
    "deepseekmoe_145b": [
        Figure("total", "144.6B", "everything", f"{DEEPSEEKMOE}, table 7"),
        Figure("active", "22.2B", "active with vocabulary", f"{DEEPSEEKMOE}, table 7"),
    ],
    "dense_0.2b": [Figure("total", "0.2B", "everything", f"{DEEPSEEKMOE}, table 1")],
    "gshard_2b": [Figure("total", "2.0B", "everything", f"{DEEPSEEKMOE}, table 1")],
    "switch_2b": [Figure("total", "2.0B", "everything", f"{DEEPSEEKMOE}, table 1")],
    "hash_2b": [Figure("total", "2.0B", "everything", f"{DEEPSEEKMOE}, table 1")],
}


def conventions(cfg: TransformerConfig, counts: ParameterCounts) -> dict[str, int]:
    """The ways in which papers count the parameters of one model."""
    one_matrix = cfg.vocab_size * cfg.d_model
    head = 0 if cfg.tie_embeddings else one_matrix
    return {
        "without vocabulary": counts.total,  # Engram 3.1: P_tot
        "with head": counts.total + head,  # Engram table 5
        "everything": counts.total + counts.embedding,
        "active": counts.active,  # P_act
        "active with head": counts.active + one_matrix,
        "active with vocabulary": counts.active + counts.embedding,
        "memory": counts.memory,
        "embedding and head": counts.embedding,
    }


def short(value: float) -> str:
    """1234567890 -> 1.235B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def model_config(name: str, overrides: list[str]) -> Config:
    """The configuration of a preset with changes."""
    return compose(Config, "train_schema", "train", [f"model={name}", *overrides])


def parameter_table(name: str, cfg: TransformerConfig) -> tuple[str, Table]:
    """Every convention, and the paper's figures beside ours."""
    counts = count_parameters(cfg)
    assert counts.trained_by_engine == sum(p.numel() for p in meta_model(cfg).parameters()), "closed form and module"
    ours = conventions(cfg, counts)
    table = Table("counted", "parameters", "paper", "difference", "source")
    for convention, value in ours.items():
        figures = [figure for figure in PAPERS.get(name, []) if figure.counted == convention]
        for figure in figures:
            mark = "" if figure.agrees(value) else " (!)"
            table.add_row(
                convention, short(value), figure.printed, f"{value / figure.value - 1:+.2%}{mark}", figure.source
            )
        if not figures:
            table.add_row(convention, short(value), "", "", "")
    table.add_row("rho", f"{counts.rho:.4f}", "", "", "share of inactive parameters in experts")
    return f"{name}: parameters", table


def flops_table(name: str, cfg: TransformerConfig) -> tuple[str, Table]:
    """FLOPs of one token's forward pass by part."""
    flops = flops_per_token(cfg)
    table = Table("part", "FLOPs", "share")
    for part, value in flops.to_dict().items():
        if value:
            table.add_row(part.replace("_", " "), short(value), f"{value / flops.with_head:.1%}")
    return f"{name}: FLOPs per token, forward, {cfg.seq_len} positions", table


def bytes_table(name: str, config: Config, layout: Layout, micro_batch_size: int) -> tuple[str, Table]:
    """GiB per device by part and role; below the sum, rows that lie elsewhere."""
    cfg, optim = config.model, config.optim
    title = (
        f"{name}: GiB on the fullest of {layout.world_size} devices, ZeRO {layout.zero_stage}, experts over "
        f"{layout.expert_parallel_size}, rows over {layout.table_shards}, "
        f"{'bf16' if layout.bf16_weights else 'fp32'} weights, {optim.kind.value}; micro-batch {micro_batch_size} x "
        f"{cfg.seq_len} in bf16, checkpointing {cfg.activation_checkpointing.value}"
    )
    table = Table("part", "weights", "gradients", "optimizer", "activations", "all")
    parts = footprints(cfg, optim, layout, config.memory, config.table)
    kept = activations(cfg, layout, micro_batch_size)
    for part, each in parts.items():
        cells = (each.weights, each.gradients, each.optimizer)
        table.add_row(part, *(gib(cell) for cell in cells), "", gib(each.total))
    table.add_section()
    for part, size in kept.items():
        table.add_row(part, "", "", "", gib(size), gib(size))
    table.add_section()
    total, all_kept = sum(parts.values(), Footprint(0, 0, 0)), sum(kept.values())
    sums = (total.weights, total.gradients, total.optimizer, all_kept, total.total + all_kept)
    table.add_row("all", *(gib(size) for size in sums))
    elsewhere = rows_elsewhere(cfg, layout, config.memory, config.table)
    if elsewhere:
        table.add_section()
    for part, each in elsewhere.items():
        table.add_row(f"not on the device: {part}", gib(each.weights), "", gib(each.optimizer), "", gib(each.total))
    return title, table


def gib(size: float) -> str:
    """Bytes -> 2^30 bytes, two digits."""
    return f"{size / 2**30:.2f}"


def comparison(names: list[str]) -> str:
    """Every preset's figures against its paper's, in Markdown."""
    lines = [
        "| preset | figure | counted | ours | paper | difference | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cfg = model_config(name, []).model
        ours = conventions(cfg, count_parameters(cfg))
        for figure in PAPERS[name]:
            value = ours[figure.counted]
            lines.append(
                f"| `{name}` | {figure.what} | {figure.counted} | {short(value)} | {figure.printed} | "
                f"{value / figure.value - 1:+.2%} | {figure.source} |"
            )
    return "\n".join(lines) + "\n"


# What the messages of train/footprint.py name, and the option that sets it.
_OPTIONS = {
    "world_size=": "--world-size ", "zero_stage=": "--zero ", "expert_parallel_size=": "--expert-parallel ",
    "table_shards=": "--table-shards ", "micro_batch_size=": "--micro-batch ",
}  # fmt: skip


def _with_options(message: str) -> str:
    """A message that names options instead of arguments."""
    for name, option in _OPTIONS.items():
        message = message.replace(name, option)
    return message


def main(arguments: list[str]) -> int:
    """Print the tables; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.params", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="tiny", help="a preset of conf/model")
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    parser.add_argument("--all", action="store_true", help="compare every preset with its paper, in Markdown")
    parser.add_argument("--zero", type=int, default=0, help="ZeRO stage, 0 to 3")
    parser.add_argument("--world-size", type=int, default=1, help="devices")
    parser.add_argument("--expert-parallel", type=int, default=1, help="devices that divide the routed experts")
    parser.add_argument("--table-shards", type=int, default=1, help="devices that divide the rows")
    parser.add_argument("--bf16-weights", action="store_true", help="bf16 weights beside fp32 master weights")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of one forward pass, for activations")
    choices = [choice.value for choice in ActivationCheckpointing]
    parser.add_argument("--checkpointing", choices=choices, help="what is kept of a block; default: the preset's")
    args = parser.parse_intermixed_args(arguments)
    if args.all:
        print(comparison(list(PAPERS)), end="")
        return 0
    try:
        config = model_config(args.model, args.overrides)
        layout = Layout(args.world_size, args.zero, args.expert_parallel, args.table_shards, args.bf16_weights)
        checkpointing = ActivationCheckpointing(args.checkpointing or config.model.activation_checkpointing)
        model = replace(config.model, activation_checkpointing=checkpointing)
        console = Console()
        for title, table in (
            parameter_table(args.model, model),
            flops_table(args.model, model),
            bytes_table(args.model, replace(config, model=model), layout, args.micro_batch),
        ):
            console.print(f"\n{title}", highlight=False, soft_wrap=True)
            console.print(table)
    except ValueError as error:
        print(f"error: {_with_options(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
