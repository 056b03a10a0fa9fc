"""csrc/ranking.cu run on the host, one fiber per CUDA thread, against the PyTorch reference."""

import pytest
import torch

from dhcl_ops import ranking as ranking_module
from tests.checks import call
from tests.ops.test_ranking import case


def host_ranks(host, distance, members, begin, offsets, total, query_cameras, gallery_cameras):
    ranks = torch.full((total,), -7)
    arrays = [t.numpy() for t in (ranks, distance, members, begin, offsets)]
    cameras = [None if t is None else t.numpy() for t in (query_cameras, gallery_cameras)]
    host.match_ranks(*arrays, *cameras, distance.dtype == torch.float64)
    return ranks


@pytest.mark.parametrize(("q", "g", "people"), [(1, 1, 1), (4, 30, 3), (3, 300, 40), (3, 260, 2)])
@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("cameras", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_match_ranks(kernels, q, g, people, levels, cameras, dtype):
    distance, qi, gi, qc, gc = case(q, g, people=people, levels=levels)
    members, begin, offsets = ranking_module.matches(qi, gi)
    arguments = (distance.to(dtype), members, begin, offsets, int(offsets[-1]))
    seen_by = (qc, gc) if cameras else (None, None)
    expected = call("reference", "match_ranks", *arguments, *seen_by)
    assert torch.equal(host_ranks(kernels, *arguments, *seen_by), expected)


def test_match_ranks_reports_an_entry_out_of_range(host):
    one = torch.tensor([0])
    arguments = (torch.zeros(1, 2), torch.tensor([5, 0]), one, torch.tensor([0, 1]), 1, None, None)
    with pytest.raises(RuntimeError, match=r"members must be in \[0, 2\) \(got 5\)"):
        host_ranks(host, *arguments)


def test_empty_launches(host):
    none = torch.zeros(0, dtype=torch.int64)
    host_ranks(host, torch.zeros(0, 3), torch.arange(3), none, torch.tensor([0]), 0, None, None)
    zero = torch.tensor([0])
    host_ranks(host, torch.zeros(1, 0), none, zero, torch.tensor([0, 0]), 0, None, None)
