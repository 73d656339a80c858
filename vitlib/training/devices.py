"""The device and the precision that a training computes with."""

import platform

import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device to compute on: ``auto`` is the GPU where there is one, else the CPU.

    Raises:
        ValueError: for a device that this machine does not have.
    """
    if device == "auto":
        accelerated = torch.accelerator.is_available()
        return torch.accelerator.current_accelerator() if accelerated else torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} is not available here; choose auto or cpu.") from error


def resolve_precision(precision: str, device: torch.device) -> str:
    """Return the precision of the matrix products: ``float32``, or ``bfloat16`` (autocast; the weights stay float32).

    ``auto`` is bfloat16 on CUDA GPUs and x86 CPUs that compute in it natively, else float32. On a CPU with AVX512-BF16
    or AMX, bfloat16 is up to twice as fast; on others it is slower than float32 (benchmarks/throughput.py).

    Raises:
        ValueError: for another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not allowed; choose one of {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = flags.get("avx512_bf16", False) or flags.get("amx_bf16", False)
    return "bfloat16" if native else "float32"


def hardware(device: torch.device) -> str:
    """Return the GPU's name, or the processor's architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def compiled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Compile for batches of fixed size. On a GPU the kernels become CUDA graphs: in a model this small, to start them
    one by one takes longer than to run them."""
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else "default")


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the global random generators of the CPU and of ``device``, for a resume file."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what :func:`random_states` has returned for the same device."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
