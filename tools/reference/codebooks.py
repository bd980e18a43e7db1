"""Prints the codebooks of GGUF's i-quants as bitmill stores them: sets of numbers whose digits, lowest first, are the
level of each weight of a vector. In every codebook the numbers ascend with the index, so the set says everything.

    python tools/reference/codebooks.py > crates/scheme/src/grids/block/codebook/sets.rs
"""

from importlib.metadata import version

import gguf.quants
import numpy as np

NAMES = {
    "IQ2_XXS": "256 of the 3^8 vectors of eight", "IQ2_XS": "512 of the 3^8 vectors of eight",
    "IQ2_S": "1024 of the 3^8 vectors of eight", "IQ3_XXS": "256 of the 8^4 vectors of four",
    "IQ3_S": "512 of the 8^4 vectors of four", "IQ1": "2048 of the 3^8 vectors of eight",
}


def words(name):
    kind = getattr(gguf.quants, "IQ1_S" if name == "IQ1" else name)
    kind.init_grid()
    grid = kind.grid.reshape(kind.grid_shape)
    levels = np.array(kind.grid_map)
    digits = np.searchsorted(levels, grid)
    numbers = (digits * len(levels) ** np.arange(grid.shape[1])).sum(1)
    assert (np.diff(numbers) > 0).all() and (levels[digits] == grid).all()
    bits = np.zeros(-(-len(levels) ** grid.shape[1] // 64) * 64, dtype=np.uint8)
    bits[numbers] = 1
    return np.packbits(bits, bitorder="little").view(np.uint64)


def main():
    print("//! The codebooks of the i-quants, as sets: bit n stands for the vector whose levels are the digits of n, lowest")
    print("//! first. They are constants of the format, and the index of a vector is the number of members below it.")
    print("//!")
    print(f"//! Written by tools/reference/codebooks.py from gguf-py {version('gguf')}.")
    for name, about in NAMES.items():
        table = words(name)
        print(f"\n/// {about}.\n#[rustfmt::skip]\npub(super) static {name}: [u64; {len(table)}] = [")
        for i in range(0, len(table), 5):
            print("    " + " ".join(f"0x{w:016x}," for w in table[i:i + 5]))
        print("];")


if __name__ == "__main__":
    main()
