"""What a step through attention costs on a processor: PyTorch's fused kernel against plain matrix products.

    python benchmarks/attention_kernels.py --threads 1 --output docs/results/attention-kernels.json

Forward and backward, without dropout, in turns; "forward" is what a frozen encoder runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from alembert.benchmarks.timing import interleave, machine_description, ratio
from alembert.common.files import write_json

SHAPES = {
    "32x12, 12 heads of 32": (32, 12, 12, 32),
    "32x64, 12 heads of 32": (32, 12, 64, 32),
    "32x128, 12 heads of 64": (32, 12, 128, 64),
}
"""Rows × tokens: rows, heads, tokens, size of a head."""
KERNELS = {"fused": SDPBackend.FLASH_ATTENTION, "products": SDPBackend.MATH}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints and returns the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, shape in SHAPES.items():
            inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
            for learns in (True, False):
                calls = {kernel: partial(attend, inputs, KERNELS[kernel], learns) for kernel in KERNELS}
                timings = interleave(calls, repeats=given.repeats)
                gain = ratio(timings["fused"], timings["products"])
                rows.append(
                    {
                        "shape": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "pass": "forward and backward" if learns else "forward",
                        "fused_ms": 1000 * timings["fused"].median,
                        "products_ms": 1000 * timings["products"].median,
                        "fused_over_products": gain.median,
                        "quartiles": [gain.lower, gain.upper],
                    }
                )
                print(
                    "{dtype:9} {shape:24} {pass:21} {fused_over_products:6.2f}".format(**rows[-1]), flush=True
                )
    machine = machine_description() | {"threads": given.threads}
    results = {"machine": machine, "repeats": given.repeats, "results": rows}
    if given.output:
        write_json(given.output, results)
    return results


def attend(inputs: Sequence[torch.Tensor], kernel: SDPBackend, learns: bool) -> None:
    """One pass, with gradients if it `learns`."""
    with sdpa_kernel(kernel), torch.set_grad_enabled(learns):
        output = torch.nn.functional.scaled_dot_product_attention(*inputs)
    if learns:
        output.sum().backward()


if __name__ == "__main__":
    main()
