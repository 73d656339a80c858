"""Rank, world size and collectives for ``torchrun``. A single process runs the same code with a world size of 1."""

import gc
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class DistributedContext:
    """The processes that train one model together, seen from one of them.

    Args:
        rank: number of this process, from 0; the first process writes the files and shows progress.
        world_size: number of processes on all machines.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shard(self, batch: Tensor) -> Tensor:
        """Return this process's part of a batch; the parts differ by one image at most."""
        return batch.tensor_split(self.world_size)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes (all-reduce); every process must call this."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list:
        """Return the values of all processes, by rank (all-gather); every process must call this."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def from_first(self, work: Callable[[], object]) -> object:
        """Call ``work`` in the first process and return its result in all of them; every process must call this.

        A ValueError is raised in all of them, too: the others would wait for the first for ever.
        """
        outcome = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except ValueError as error:
                outcome[1] = error
        if self.world_size > 1:
            dist.broadcast_object_list(outcome, src=0)
        result, refusal = outcome
        if refusal is not None:
            raise refusal
        return result

    def parallel(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DDP, which averages the gradients of all processes; return it as it is for one process."""
        return model if self.world_size == 1 else nn.parallel.DistributedDataParallel(model)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate. Each loss is a share of the batch's, so the gradients must add up, but DDP averages them."""
        (loss * self.world_size).backward()


def init_distributed(device: str = "auto") -> str:
    """Join the other processes if ``torchrun`` has started this one, and return the device of this process.

    Each process of a machine takes one of its GPUs, and they exchange gradients over NCCL; without GPUs, over gloo.

    Returns:
        ``cpu``, or ``cuda:i`` with the number of this process on its machine; ``device`` itself without torchrun.

    Raises:
        ValueError: if one GPU is named for several processes, or a machine has fewer GPUs than processes.
    """
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    local, on_machine = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if on_machine > torch.cuda.device_count():
            raise ValueError(
                f"nproc-per-node={on_machine} is more than the {torch.cuda.device_count()} GPUs of this machine; "
                "start one process per GPU."
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    elif device != "cpu":
        raise ValueError(f"device={device!r} is one device for {on_machine} processes; give auto, cuda or cpu.")
    # import it before the group exists: a default argument in it would hold the group, and so keep it from ending
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return device


def end_distributed() -> None:
    """Leave the processes that :func:`init_distributed` has joined, if any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # of DDP's wrappers: a communication thread that outlives the interpreter aborts the process


def current_context() -> DistributedContext:
    """Return the context of the processes that this one has joined, or of this one alone."""
    joined = dist.is_available() and dist.is_initialized()
    return DistributedContext(dist.get_rank(), dist.get_world_size()) if joined else DistributedContext()
