"""What torch.distributed raises when another rank is lost, and what callers are told instead."""

from __future__ import annotations

import torch.distributed as dist

__all__ = ["PeerError", "is_lost_peer"]


class PeerError(RuntimeError):
    """Another rank was lost, or did not answer in the process group's time; names the stage."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another rank is gone or does not answer.

    Gloo raises bare RuntimeErrors, which are known by their text alone.
    """
    if isinstance(error, (PeerError, dist.DistBackendError, dist.DistNetworkError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "peer" in text)
