"""DeepSeekMoE layer: shared expert plus top-k routed experts (arXiv 2401.06066)."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import native
from models.baseline_routers import AnyRouter, HashRouter, make_router
from models.expert_kernels import (
    Bucket,
    check_grouped_mm_widths,
    check_triton_widths,
    swiglu_grouped_mm,
    swiglu_loop,
    swiglu_native,
    swiglu_padded,
    swiglu_triton,
)
from models.feed_forward import SwiGLU
from models.precision import compute_dtype
from models.router import RouterConfig


class ExpertKernel(str, Enum):
    """How the routed experts are multiplied; all give the same function, at different speed."""

    # Resolved when a run is planned: `padded` on a CPU, on a GPU the fastest as measured (train/kernel_choice.py). A
    # model that is built with it computes as `padded`.
    auto = "auto"
    loop = "loop"  # one matmul per expert: the definition
    # Batched matmuls over experts of similar load, each group padded to the fullest of them; the native kernel in their
    # place where it is in use (models/native/experts.c: bf16 in one thread of a CPU with a matrix unit).
    padded = "padded"
    grouped_mm = "grouped_mm"  # torch.nn.functional.grouped_mm
    triton = "triton"  # models/kernels/grouped_swiglu.py on a GPU; elsewhere the loop


@dataclass
class MoEConfig:
    """Shape of the mixture-of-experts layers."""

    num_experts: int = 64  # routed experts per layer (N_r)
    d_expert: int = 64  # width of one routed expert
    num_shared_experts: int = 2  # the shared expert is one SwiGLU of width num_shared_experts * d_expert
    shared_widths: list[int] | None = None  # its width per MoE layer instead (first MoE layer first); 0 = none
    expert_kernel: ExpertKernel = ExpertKernel.auto
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        if self.d_expert < 1:
            raise ValueError(f"model.moe.d_expert={self.d_expert} must be at least 1; nearest: 1")
        self.router.check_num_experts(self.num_experts)
        if self.num_shared_experts < 0:
            raise ValueError(f"model.moe.num_shared_experts={self.num_shared_experts} must not be negative; nearest: 0")
        if self.shared_widths is not None and any(width < 0 for width in self.shared_widths):
            raise ValueError(
                f"model.moe.shared_widths={self.shared_widths} must hold no negative width; use 0 for no shared expert"
            )

    def shared_width(self, moe_layer: int) -> int:
        """Width of the shared expert of the `moe_layer`-th MoE layer (0 = the first one); 0 means none."""
        if self.shared_widths is None:
            return self.num_shared_experts * self.d_expert
        return self.shared_widths[moe_layer]


class Dispatched(NamedTuple):
    """Tokens laid out by expert, as `dispatch` returns them and `combine` takes them back.

    Without padding: T * K rows, expert 0's first. With padding: experts from the fullest to the emptiest, cut into
    buckets of similar load; rows beyond an expert's count repeat token 0 with weight 0, so that they change nothing.
    """

    tokens: Tensor  # (rows, D)
    counts: Tensor  # (E,) int64, rows per expert without padding
    weights: Tensor  # (rows, 1) gate value of every row, in the type of `tokens`
    slots: Tensor  # (T, K) int64, the row of each token's k-th expert
    token_of_row: Tensor  # (rows,) int64, the token in each row
    order: Tensor | None  # (E,) int64, experts as the rows are laid out; None without padding
    buckets: list[Bucket]  # empty without padding
    route: Any = None  # what a dispatcher across processes needs to bring outputs back


class Dispatcher(Protocol):
    """Brings tokens to their experts and the experts' weighted outputs back.

    In a `Dispatched` of a dispatcher across processes, E are the experts that lie here.
    """

    local_experts: range  # the experts that lie here, of all in the layer

    def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        """Groups x (T, D) by the experts in expert_ids (T, K) int64; weights (T, K) are the gate values."""
        ...

    def combine(self, outputs: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum of each token's K rows of `outputs`, which are already weighted: (T, D)."""
        ...


class _Gather(torch.autograd.Function):
    """Token and gate value of every row. A token fills exactly K rows, so its gradient is a sum of K gathered rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, slots: Tensor, token_of_row: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(slots)
        ctx.weights_dtype = weights.dtype
        row_weights = x.new_zeros(token_of_row.shape[0])
        row_weights[slots.flatten()] = weights.flatten().to(x.dtype)
        return x.index_select(0, token_of_row), row_weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        grad_tokens, grad_row_weights = grads
        grad_x = F.embedding_bag(slots, grad_tokens.contiguous(), mode="sum")
        return grad_x, grad_row_weights[slots].to(ctx.weights_dtype), None, None


class _Combine(torch.autograd.Function):
    """Sum of each token's K rows. The gradient of a row is its token's; in the padding the zero weight removes it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, token_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return F.embedding_bag(slots, rows, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (token_of_row,) = ctx.saved_tensors
        return grads[0].index_select(0, token_of_row), None, None


def gather_rows(x: Tensor, weights: Tensor, slots: Tensor, token_of_row: Tensor) -> tuple[Tensor, Tensor]:
    """Copies tokens into rows: x (T, D), weights and slots (T, K), token_of_row (rows,) -> (rows, D), (rows,)."""
    tokens, row_weights = _Gather.apply(x, weights, slots, token_of_row)
    return tokens, row_weights


def combine_rows(rows: Tensor, slots: Tensor, token_of_row: Tensor) -> Tensor:
    """The sum of each token's K rows: rows (rows, D), slots (T, K), token_of_row (rows,) -> (T, D)."""
    combined: Tensor = _Combine.apply(rows, slots, token_of_row)
    return combined


# Rows of a padded group come in multiples of this.
ROW_MULTIPLE = 32
# Most experts in one bucket: larger ones cost padding, smaller ones calls.
MAX_BUCKET = 4


def padded_length(count: int) -> int:
    """`count` rounded up to a multiple of ROW_MULTIPLE, or of an eighth of the power of two below if that is more."""
    multiple = max(ROW_MULTIPLE, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // multiple) * multiple


def make_buckets(sorted_counts: list[int]) -> list[Bucket]:
    """Cut experts, sorted from the fullest to the emptiest, into runs of 1, 1, 2, 4, 4, ... experts.

    The few fullest experts differ most, so they go alone; buckets without rows are left out. The number of experts in
    a bucket depends on its place alone, and lengths lie on a coarse grid: on CPU oneDNN builds a new bf16 kernel for
    every new shape (0.6 ms, against 0.1 ms for the matmul itself), so few shapes must serve all loads.
    """
    buckets: list[Bucket] = []
    first = 0
    while first < len(sorted_counts) and sorted_counts[first] > 0:
        last = min(first + min(max(first, 1), MAX_BUCKET), len(sorted_counts))
        buckets.append(Bucket(first, last, padded_length(sorted_counts[first])))
        first = last
    return buckets


class LocalDispatcher:
    """All experts on this process: a permutation, forward and backward made of gathers only.

    Args:
        num_experts: E.
        padded: lay experts out in buckets (see `make_buckets`) instead of without gaps.
    """

    def __init__(self, num_experts: int, padded: bool):
        self.num_experts = num_experts
        self.local_experts = range(num_experts)
        self.padded = padded

    def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        """Copies every token once per chosen expert, in the order of the experts."""
        num_tokens, top_k = expert_ids.shape
        flat_ids = expert_ids.flatten()  # (T * K,)
        sorted_ids, pair_of_row = flat_ids.sort(stable=True)
        # On a GPU bincount makes the host wait; a search in what is sorted does not.
        counts = torch.searchsorted(sorted_ids, torch.arange(self.num_experts + 1, device=x.device)).diff()
        row = torch.arange(flat_ids.shape[0], device=x.device)
        order, buckets = None, []
        if self.padded:
            sorted_counts, order = counts.sort(descending=True, stable=True)
            buckets = make_buckets(sorted_counts.tolist())
            lengths = [length for first, last, length in buckets for _ in range(first, last)]
            lengths += [0] * (self.num_experts - len(lengths))
            padded_ends = torch.tensor(lengths, device=x.device).cumsum(0)
            first_row = torch.empty_like(counts)  # of each expert, in the padded layout
            first_row[order] = padded_ends - torch.tensor(lengths, device=x.device)
            row = row + (first_row - (counts.cumsum(0) - counts))[sorted_ids]
            token_of_row = row.new_zeros(int(padded_ends[-1]))
            token_of_row[row] = pair_of_row // top_k
        else:
            token_of_row = pair_of_row // top_k
        slots = torch.empty_like(row)
        slots[pair_of_row] = row
        slots = slots.view(num_tokens, top_k)
        tokens, row_weights = gather_rows(x, weights, slots, token_of_row)
        return Dispatched(tokens, counts, row_weights[:, None], slots, token_of_row, order, buckets)

    def combine(self, outputs: Tensor, dispatched: Dispatched) -> Tensor:
        """Sums the K rows of every token."""
        return combine_rows(outputs, dispatched.slots, dispatched.token_of_row)


class Experts(nn.Module):
    """E SwiGLU experts with stacked weights, applied to tokens grouped by expert.

    Args:
        num_experts: E, the experts that lie here.
        d_model: D.
        d_expert: F.
        kernel: how they are multiplied.
        first: number of the first of them among all experts of the layer.
    """

    def __init__(self, num_experts: int, d_model: int, d_expert: int, kernel: ExpertKernel, first: int = 0):
        super().__init__()
        self.first = first
        if kernel is ExpertKernel.grouped_mm:
            check_grouped_mm_widths(d_model, d_expert)
        if kernel is ExpertKernel.triton:
            check_triton_widths(d_model, d_expert)
        self.kernel = kernel
        self.gate_up = nn.Parameter(torch.empty(num_experts, d_model, 2 * d_expert))  # (E, D, 2F), the gate first
        self.down = nn.Parameter(torch.empty(num_experts, d_expert, d_model))  # (E, F, D)

    def forward(self, dispatched: Dispatched) -> Tensor:
        """Weighted outputs, w_r * down(silu(gate(x_r)) * up(x_r)), in the layout of `dispatched.tokens`."""
        tokens, counts, weights = dispatched.tokens, dispatched.counts, dispatched.weights
        if dispatched.order is None and self.kernel is ExpertKernel.triton:
            return swiglu_triton(tokens, weights, counts, self.gate_up, self.down)
        gate_up, down = self.gate_up.to(tokens.dtype), self.down.to(tokens.dtype)
        if dispatched.order is not None:
            return swiglu_padded(tokens, weights, gate_up, down, dispatched.order, dispatched.buckets)
        if self.kernel is ExpertKernel.grouped_mm:
            return swiglu_grouped_mm(tokens, weights, counts, gate_up, down)
        return swiglu_loop(tokens, weights, counts, gate_up, down)


def is_padded(cfg: MoEConfig) -> bool:
    """Whether the experts' kernel wants its tokens in buckets; see `make_buckets`."""
    return cfg.expert_kernel in (ExpertKernel.auto, ExpertKernel.padded)


class MoEStats(NamedTuple):
    """What one MoE layer reports beside its output; see `Routing`."""

    counts: Tensor  # (E,) int64
    aux_losses: dict[str, Tensor]
    entropy: Tensor | None
    dropped: Tensor | None


class MoE(nn.Module):
    """shared(x) + sum over the chosen experts of gate_i * expert_i(x) (V3 eq 12).

    Only routers with a capacity drop choices. Those have gate value 0, so that they add nothing to the output and move
    no weight; their rows are multiplied all the same, so that a drop saves no time.

    Args:
        cfg: the layer's shape.
        d_model: D.
        shared_width: width of the shared expert; 0 = none.
        dispatcher: how tokens reach the experts; by default all experts are local.
        vocab_size: V, for the hash router.
        layer: position in the model, for the hash router.
    """

    def __init__(
        self,
        cfg: MoEConfig,
        d_model: int,
        shared_width: int,
        dispatcher: Dispatcher | None = None,
        vocab_size: int | None = None,
        layer: int = 0,
    ):
        super().__init__()
        self.router: AnyRouter = make_router(cfg.router, d_model, cfg.num_experts, vocab_size, layer)
        self.dispatcher = dispatcher if dispatcher is not None else LocalDispatcher(cfg.num_experts, is_padded(cfg))
        local = self.dispatcher.local_experts
        self.experts = Experts(len(local), d_model, cfg.d_expert, cfg.expert_kernel, local.start)
        self.shared_expert = SwiGLU(d_model, shared_width) if shared_width else None

    def forward(
        self, x: Tensor, token_ids: Tensor | None = None, rounded: Tensor | None = None
    ) -> tuple[Tensor, MoEStats]:
        """The layer's update (B, S, D), and what the router reports.

        Args:
            x: (B, S, D), what the router sees.
            token_ids: (B, S), for the hash router.
            rounded: x in the type of the matmuls, what the experts see; None: rounded here.
        """
        if isinstance(self.router, HashRouter):
            assert token_ids is not None, "the hash router looks at tokens"
            routing = self.router(token_ids)
        else:
            routing = self.router(x)
        fused = self._fused(x)
        x = x.to(compute_dtype(x)) if rounded is None else rounded
        tokens = x.flatten(0, 1)  # (T, D)
        if fused:
            experts = (self.experts.gate_up, self.experts.down, self.shared_expert)
            update = swiglu_native(tokens, routing.expert_ids, routing.weights, *experts).view_as(x)
        else:
            update = self.routed(tokens, routing.expert_ids, routing.weights).view_as(x)
            update = update if self.shared_expert is None else update + self.shared_expert(x)
        return update, MoEStats(routing.counts, routing.aux_losses, routing.entropy, routing.dropped)

    def routed(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """Sum of the chosen experts' weighted outputs: tokens (T, D), expert_ids and weights (T, K) -> (T, D)."""
        dispatched = self.dispatcher.dispatch(tokens, expert_ids, weights)
        return self.dispatcher.combine(self.experts(dispatched), dispatched)

    def _fused(self, x: Tensor) -> bool:
        """Whether one native kernel does dispatch, all experts and combine: only where these are the usual ones."""
        is_local = isinstance(self.dispatcher, LocalDispatcher) and self.dispatcher.padded
        weights: list[Tensor] = [self.experts.gate_up, self.experts.down]
        if self.shared_expert is not None:
            weights += [self.shared_expert.gate_up.weight, self.shared_expert.down.weight]
        in_fp32 = all(weight.dtype == torch.float32 for weight in weights)
        return is_local and in_fp32 and native.matrices_available(x)
