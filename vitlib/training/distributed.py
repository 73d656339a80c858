"""Several processes that train one model together, as ``torchrun`` starts them: who is who, and what they exchange.

One process alone is the same with ``count`` 1: every exchange then gives back what it was given.
"""

import gc
import importlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """The processes of this training, seen from one of them.

    Args:
        rank: number of this process, from 0; the first one writes the files and shows progress.
        count: number of processes, on all machines together.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, as even as possible; the shares of all in a row are the whole batch."""
        return batch.tensor_split(self.count)[self.rank]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that all processes give; every process must call this."""
        if self.count > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: object) -> list:
        """What all processes give, in their order."""
        values = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: object) -> object:
        """What the first process gives; the others may give None."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model so wrapped that ``backward`` averages the gradients of all processes."""
        if self.count == 1:
            return model
        device = next(model.parameters()).device
        return nn.parallel.DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


def join_processes(device: str = "auto") -> str:
    """Join the other processes that ``torchrun`` has started, if it has, and say which device is this one's.

    The processes of one machine take its GPUs in turn and exchange gradients over NCCL; without GPUs they use gloo.

    Returns:
        ``device``, or ``cuda:i`` with the number of this process on its machine.

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
    # a default argument in it would keep the group, if it were there already when DistributedDataParallel imports this
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    return device


def leave_processes() -> None:
    """End what :func:`join_processes` began; does nothing in a process of its own.

    The threads that exchange data end with the last reference to the group, and one that outlives the interpreter
    aborts the process. So wrapped models, which hold such references in cycles, are collected here.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def current_processes() -> Processes:
    """The processes that this one has joined, or just itself."""
    joined = dist.is_available() and dist.is_initialized()
    return Processes(dist.get_rank(), dist.get_world_size()) if joined else Processes()
