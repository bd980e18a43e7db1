"""Times llama.cpp's products with 4-bit weights, as `cargo xtask bench products` asks for them.

A line `TOKENS ROWS COLUMNS` has random activations meet matrices of that shape, of q4_0 and of q4_k, as they lie and as the CPU
backend repacks them, and is answered by names and seconds. One token meets so many copies of a matrix, one after another, that no
cache holds them. ggml is called through its own libraries, as a shared build of llama.cpp leaves them in `bin`
(libggml-base.so, libggml-cpu.so).
"""

import argparse
import ctypes
import sys
import time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

TYPES = {"q4_0": 2, "q4_k": 12}
"""Numbers of the types in ggml.h."""
F32 = 0
UNCACHED = 256e6
"""Bytes that no cache holds."""
SPINNING = 0.01
"""Seconds after which OpenMP's threads no longer wait for work by spinning."""


class InitParams(Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


FUNCTIONS = {
    "base": {
        "ggml_init": (c_void_p, [InitParams]),
        "ggml_log_set": (None, [c_void_p, c_void_p]),
        "ggml_tensor_overhead": (c_size_t, []),
        "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
        "ggml_row_size": (c_size_t, [c_int, c_int64]),
        "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
        "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
        "ggml_build_forward_expand": (None, [c_void_p] * 2),
        "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
        "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p] * 2),
        "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_buffer_free": (None, [c_void_p]),
        "ggml_backend_buft_name": (c_char_p, [c_void_p]),
        "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
        "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    },
    "cpu": {
        "ggml_backend_cpu_init": (c_void_p, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
        "ggml_backend_cpu_reg": (c_void_p, []),
        "ggml_backend_cpu_buffer_type": (c_void_p, []),
    },
}


class Ggml:
    """The functions of ggml that are called here, by their names without `ggml_`."""

    def __init__(self, folder: Path, threads: int) -> None:
        for part, functions in FUNCTIONS.items():
            library = ctypes.CDLL(str(folder / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        # It reports every tensor that it repacks.
        self.silence = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda *_: None)
        self.log_set(ctypes.cast(self.silence, c_void_p), None)
        self.cpu = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.cpu, threads)

    def buffer_types(self) -> dict[str, int]:
        """Where matrices may lie: in plain memory, and repacked where this build knows how."""
        types = {"": self.backend_cpu_buffer_type()}
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(registry, 0))
            index = 0
            while extra and extra[index]:
                if b"REPACK" in self.backend_buft_name(extra[index]):
                    types["/repacked"] = extra[index]
                index += 1
        return types


class Products:
    """Products of one shape: a graph for each type and place of the matrices."""

    def __init__(self, ggml: Ggml, tokens: int, rows: int, columns: int) -> None:
        self.ggml, self.graphs, self.memory = ggml, {}, []
        random = np.random.default_rng(0)
        weights = random.standard_normal(rows * columns, dtype=np.float32)
        inputs = random.standard_normal(tokens * columns, dtype=np.float32)
        for name, kind in TYPES.items():
            packed = np.empty(ggml.row_size(kind, columns) * rows, dtype=np.uint8)
            ggml.quantize_chunk(kind, weights.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
            copies = int(np.ceil(UNCACHED / packed.nbytes)) if tokens == 1 else 1
            for place, buffer_type in ggml.buffer_types().items():
                matrices = self.context(copies)
                weight = [ggml.new_tensor_2d(matrices, kind, columns, rows) for _ in range(copies)]
                self.memory.append(ggml.backend_alloc_ctx_tensors_from_buft(matrices, buffer_type))
                others = self.context(2 * copies + 2)
                activation = ggml.new_tensor_2d(others, F32, columns, tokens)
                graph = ggml.new_graph_custom(others, copies + 8, False)
                for matrix in weight:
                    ggml.backend_tensor_set(matrix, packed.ctypes.data, 0, packed.nbytes)
                    ggml.build_forward_expand(graph, ggml.mul_mat(others, matrix, activation))
                self.memory.append(ggml.backend_alloc_ctx_tensors_from_buft(others, ggml.backend_cpu_buffer_type()))
                ggml.backend_tensor_set(activation, inputs.ctypes.data, 0, inputs.nbytes)
                self.graphs[name + place] = (graph, copies)

    def context(self, tensors: int) -> int:
        """A context that holds no numbers."""
        size = (tensors + 8) * self.ggml.tensor_overhead() + self.ggml.graph_overhead_custom(tensors + 8, False)
        return self.ggml.init(InitParams(size, None, True))

    def run(self) -> dict[str, float]:
        """Seconds of a product by each of them."""
        seconds = {}
        for name, (graph, copies) in self.graphs.items():
            begin = time.perf_counter()
            if self.ggml.backend_graph_compute(self.ggml.cpu, graph):
                raise SystemExit(f"ggml does not compute {name}")
            seconds[name] = (time.perf_counter() - begin) / copies
        return seconds

    def free(self) -> None:
        """Gives the matrices back."""
        for buffer in self.memory:
            self.ggml.backend_buffer_free(buffer)


def main() -> None:
    """Answers line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", type=Path, required=True, help="folder of libggml-base.so and libggml-cpu.so")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    ggml, last, products = Ggml(args.ggml, args.threads), "", None
    for line in sys.stdin:
        if line != last:
            if products:
                products.free()
            last, products = line, Products(ggml, *map(int, line.split()))
        seconds = products.run()
        # Its threads shall not take the processors from whose turn is next.
        time.sleep(SPINNING)
        print(*(f"{name} {taken}" for name, taken in seconds.items()), flush=True)


if __name__ == "__main__":
    main()
