"""``python -m microadam``: a short report of what runs the optimizer here, and why."""

from __future__ import annotations

import platform

import torch

from microadam import __version__, ops
from microadam.layout import BlockLayout
from microadam.self_test import check_kernel


def report() -> str:
    """What a bug report should contain: versions, the kernel for each device type, threads."""
    lines = {
        "microadam": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CPU": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()} in torch, "
        f"{torch.get_num_threads()} threads",
        "CUDA": _cuda(),
        "native library": "not used" if ops.load_native_library() else str(ops.NATIVE_LIBRARY),
        "step on a CPU": _kernel("cpu"),
    }
    if torch.cuda.is_available():
        lines["step on a GPU"] = _kernel("cuda")
        if ops.native_kernel("cuda"):
            lines["self-test"] = _self_test()
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch was built without it"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda} in torch, no device found"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}, {', '.join(names)}"


def _kernel(device_type: str) -> str:
    kernel = ops.native_kernel(device_type)
    return f"native ({kernel})" if kernel else f"plain torch: {ops.why_plain_torch(device_type)}"


def _self_test() -> str:
    device = torch.device("cuda", torch.cuda.current_device())
    layout = BlockLayout(0)  # the default geometry
    geometry = (layout.window_size, layout.density, layout.bucket_size, layout.block_size)
    try:
        for dtype in ops.DTYPES:
            check_kernel(device, dtype, dtype, geometry)
    except RuntimeError as error:
        return f"FAILED: {error}"
    return "passed: the same steps as plain torch"


if __name__ == "__main__":
    print(report())
