"""Times PyTorch's products of bfloat16, which are oneDNN's on a CPU, and its factors, as `cargo xtask bench dense` asks for them.

A line `gemm M K N` multiplies matrices [M, K] and [N, K], `a @ b.T`, and a line `syrk TOKENS N` a matrix [TOKENS, N] by itself,
`x.T @ x`; a line `factor N` takes a positive definite matrix of f64 into its Cholesky factor, and a line `solve N ROWS` solves with
such a factor for so many right-hand sides. Each is answered by a name and seconds. A number more, `gemm M K N TIMES`, has it done so many times in a row, where
once takes so little that waking threads would count, and the seconds are those of once.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable

SPINNING = 0.01
"""Seconds after which OpenMP's threads no longer wait for work by spinning."""


def prepared(torch, what: str, shape: list[int]) -> Callable:
    """What is to be done with random matrices of that shape."""
    if what == "gemm":
        m, k, n = shape
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        return lambda: a @ b.T
    if what == "syrk":
        x = torch.randn(*shape).bfloat16()
        return lambda: x.T @ x
    if what in ("factor", "solve"):
        n = shape[0]
        # A diagonal that outweighs its row makes it positive definite.
        h = torch.rand(n, n, dtype=torch.float64)
        h = torch.tril(h) + torch.tril(h, -1).T + n * torch.eye(n, dtype=torch.float64)
        if what == "factor":
            return lambda: torch.linalg.cholesky(h)
        l, b = torch.linalg.cholesky(h), torch.randn(n, shape[1], dtype=torch.float64)
        return lambda: torch.cholesky_solve(b, l)
    raise SystemExit(f"no such work as {what}: gemm M K N, syrk TOKENS N, factor N, or solve N ROWS")


def main() -> None:
    """Answers line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="the most that oneDNN may use, as ONEDNN_MAX_CPU_ISA names it: AVX512_CORE_BF16")
    args = parser.parse_args()
    if args.isa:
        os.environ["ONEDNN_MAX_CPU_ISA"] = args.isa
    import torch  # it reads the environment as it loads

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    last, product, times = "", None, 1
    for line in sys.stdin:
        if line != last:
            what, *numbers = line.split()
            numbers = [int(number) for number in numbers]
            sides = {"gemm": 3, "factor": 1}.get(what, 2)
            product = None  # gives the matrices back before there are others
            last, product, times = line, prepared(torch, what, numbers[:sides]), (numbers[sides:] or [1])[0]
        with torch.inference_mode():
            begin = time.perf_counter()
            for _ in range(times):
                product()
            seconds = (time.perf_counter() - begin) / times
        # Its threads shall not take the processors from whose turn is next.
        time.sleep(SPINNING)
        print("lapack" if line.startswith(("factor", "solve")) else "onednn", seconds, flush=True)


if __name__ == "__main__":
    main()
