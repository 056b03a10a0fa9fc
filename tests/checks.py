"""The checklist every op goes through, in one place. Each check raises AssertionError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dhcl_ops import _ops


def call(implementation: str, name: str, *args: Any) -> Any:
    """Call an op's compiled kernel (if there is one) or its reference."""
    op = _ops.OPS[name]
    return op.reference(*args) if implementation == "reference" else op.overload(*args)


def clones(args: Sequence[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bits; NaN equals NaN of the same bits."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.cpu().contiguous().view(integer), b.cpu().contiguous().view(integer))


def same_bits_twice(function: Callable[[], torch.Tensor], times: int = 3) -> None:
    first = function()
    for _ in range(times):
        assert same_bits(first, function())


def for_any_thread_count(function: Callable[[], torch.Tensor]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = function()
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert same_bits(one, function()), f"{threads} threads give other bits than one"
    finally:
        torch.set_num_threads(before)


def no_worse_than_plain(
    ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, slack: float = 1.05
) -> None:
    """In half precision compare errors, not values: ours against plain PyTorch in that dtype."""
    our_error = (ours.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    assert our_error <= slack * plain_error + 1e-12, f"error {our_error}, plain {plain_error}"


def opcheck(name: str, args: Sequence[Any]) -> None:
    results = torch.library.opcheck(_ops.OPS[name].overload, tuple(args))
    assert set(results.values()) == {"SUCCESS"}, results


def compiles_fullgraph(
    function: Callable[..., Any], first: Sequence[Any], *others: Sequence[Any], backend: str
) -> None:
    """Same result compiled as one graph; further arguments of the same shapes do not recompile."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, got = function(*clones(first)), compiled(*clones(first))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for args in others:
            torch.testing.assert_close(
                compiled(*clones(args)), function(*clones(args)), rtol=0, atol=0
            )


def compiles_with_backward(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, backend: str
) -> None:
    torch.compiler.reset()
    grads = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        out.backward(torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out).to(out))
        grads.append((out.detach(), leaf.grad))
    torch.testing.assert_close(grads[1][0], grads[0][0], rtol=0, atol=0)
    torch.testing.assert_close(grads[1][1], grads[0][1], rtol=0, atol=0)


def on_side_stream(function: Callable[[], torch.Tensor], expected: torch.Tensor) -> None:
    """CUDA: right on a stream that is not the default one, behind work queued on it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        got = function()
    stream.synchronize()
    assert same_bits(got, expected)


def captured_in_graph(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """CUDA: capture the call in a graph, which raises if anything synchronises with the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


# What makes torch's CUDA code read numbers back, since a result or its size depends on them.
READS_BACK = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    # Ours that make rows of lists, once each.
    "dhcl::jaccard_join",
    "dhcl::k_reciprocal",
    "dhcl::mirror_csr",
    "dhcl::query_expand",
}


class _Watch(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op._schema.name
        by_mask = name in {"aten::index", "aten::index_put_"} and any(
            t is not None and t.dtype == torch.bool for t in tree_leaves(args[1])
        )
        unsized = name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in READS_BACK or by_mask or unsized:
            self.seen.append(name)
        return op(*args, **(kwargs or {}))


class _WatchLists(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if call is torch.Tensor.tolist:
            self.seen.append("tolist")
        return call(*args, **(kwargs or {}))


def host_reads(function: Callable[[], Any]) -> list[str]:
    """Where a call would wait for a CUDA device to give it numbers; found without one."""
    seen: list[str] = []
    with _WatchLists(seen), _Watch(seen):
        function()
    return seen


def no_host_synchronisation(function: Callable[[], Any]) -> None:
    """CUDA: raise if the call waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function()
    finally:
        torch.cuda.set_sync_debug_mode(before)
