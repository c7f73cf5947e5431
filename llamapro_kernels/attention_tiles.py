"""The tiles of attention's kernels: how much of it one program owns, and how it is launched."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a tile, warps of a program, and tiles that are loaded at a time."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """The keywords of a launch."""
        return {
            "BLOCK_Q": self.block_q,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# By architecture, kernel and padded head dimension: where nothing else is said, the largest that
# leave no register spilled. Where tensor descriptors cannot be used, newer GPUs take the tiles of
# sm_86.
TILES = {
    "sm_80": {
        "forward": {
            64: Tile(block_q=64, block_k=64, num_warps=4, num_stages=3),
            128: Tile(block_q=128, block_k=64, num_warps=8, num_stages=3),
            256: Tile(block_q=64, block_k=64, num_warps=8, num_stages=2),
        },
        "dq": {
            64: Tile(block_q=128, block_k=64, num_warps=8, num_stages=2),
            128: Tile(block_q=128, block_k=32, num_warps=8, num_stages=2),
            256: Tile(block_q=64, block_k=32, num_warps=8, num_stages=2),
        },
        "dkv": {
            64: Tile(block_q=32, block_k=128, num_warps=8, num_stages=2),
            128: Tile(block_q=32, block_k=64, num_warps=8, num_stages=2),
            256: Tile(block_q=16, block_k=64, num_warps=8, num_stages=2),
        },
    },
    "sm_86": {  # 99 KiB of shared memory
        "forward": {
            64: Tile(block_q=64, block_k=64, num_warps=4, num_stages=3),
            128: Tile(block_q=128, block_k=64, num_warps=8, num_stages=2),
            256: Tile(block_q=64, block_k=32, num_warps=8, num_stages=2),
        },
        "dq": {
            64: Tile(block_q=128, block_k=64, num_warps=8, num_stages=2),
            128: Tile(block_q=128, block_k=32, num_warps=8, num_stages=2),
            256: Tile(block_q=32, block_k=32, num_warps=8, num_stages=2),
        },
        "dkv": {
            64: Tile(block_q=32, block_k=128, num_warps=8, num_stages=2),
            128: Tile(block_q=32, block_k=64, num_warps=8, num_stages=1),
            256: Tile(block_q=32, block_k=32, num_warps=8, num_stages=2),
        },
    },
    "sm_90": {  # the fastest of those measured on an H200; two programs a processor up to D = 128
        "forward": {
            64: Tile(block_q=64, block_k=128, num_warps=4, num_stages=2),
            128: Tile(block_q=64, block_k=64, num_warps=4, num_stages=3),
            256: Tile(block_q=128, block_k=64, num_warps=8, num_stages=2),
        },
        "dq": {
            64: Tile(block_q=64, block_k=64, num_warps=4, num_stages=2),
            128: Tile(block_q=64, block_k=64, num_warps=4, num_stages=3),
            256: Tile(block_q=128, block_k=32, num_warps=8, num_stages=2),
        },
        "dkv": {
            64: Tile(block_q=128, block_k=64, num_warps=4, num_stages=2),
            128: Tile(block_q=64, block_k=64, num_warps=4, num_stages=2),
            256: Tile(block_q=64, block_k=64, num_warps=8, num_stages=2),
        },
    },
    "sm_100": {
        "forward": {
            64: Tile(block_q=128, block_k=128, num_warps=8, num_stages=2),
            128: Tile(block_q=128, block_k=128, num_warps=8, num_stages=2),
            256: Tile(block_q=128, block_k=64, num_warps=8, num_stages=2),
        },
        "dq": {
            64: Tile(block_q=128, block_k=128, num_warps=8, num_stages=2),
            128: Tile(block_q=128, block_k=64, num_warps=8, num_stages=2),
            256: Tile(block_q=64, block_k=64, num_warps=8, num_stages=2),
        },
        "dkv": {
            64: Tile(block_q=32, block_k=128, num_warps=8, num_stages=2),
            128: Tile(block_q=64, block_k=128, num_warps=8, num_stages=1),
            256: Tile(block_q=32, block_k=64, num_warps=8, num_stages=1),
        },
    },
    "gfx942": {
        "forward": {
            64: Tile(block_q=128, block_k=64, num_warps=4, num_stages=1),
            128: Tile(block_q=128, block_k=64, num_warps=4, num_stages=1),
            256: Tile(block_q=64, block_k=64, num_warps=4, num_stages=1),
        },
        "dq": {
            64: Tile(block_q=128, block_k=64, num_warps=4, num_stages=1),
            128: Tile(block_q=128, block_k=32, num_warps=4, num_stages=1),
            256: Tile(block_q=64, block_k=32, num_warps=4, num_stages=1),
        },
        "dkv": {
            64: Tile(block_q=64, block_k=128, num_warps=4, num_stages=1),
            128: Tile(block_q=32, block_k=128, num_warps=4, num_stages=1),
            256: Tile(block_q=32, block_k=32, num_warps=4, num_stages=1),
        },
    },
    "fp32": {  # without matrix units: their tf32 is not precise enough
        "forward": {
            64: Tile(block_q=32, block_k=32, num_warps=4, num_stages=1),
            128: Tile(block_q=32, block_k=16, num_warps=4, num_stages=1),
            256: Tile(block_q=16, block_k=16, num_warps=8, num_stages=1),
        },
        "dq": {
            64: Tile(block_q=32, block_k=32, num_warps=4, num_stages=1),
            128: Tile(block_q=16, block_k=16, num_warps=4, num_stages=1),
            256: Tile(block_q=16, block_k=32, num_warps=8, num_stages=1),
        },
        "dkv": {
            64: Tile(block_q=16, block_k=16, num_warps=4, num_stages=1),
            128: Tile(block_q=16, block_k=32, num_warps=16, num_stages=1),
            256: Tile(block_q=16, block_k=32, num_warps=16, num_stages=1),
        },
    },
    "gfx942 fp32": {
        "forward": {
            64: Tile(block_q=32, block_k=32, num_warps=4, num_stages=1),
            128: Tile(block_q=32, block_k=16, num_warps=4, num_stages=1),
            256: Tile(block_q=16, block_k=16, num_warps=4, num_stages=1),
        },
        "dq": {
            64: Tile(block_q=32, block_k=32, num_warps=4, num_stages=1),
            128: Tile(block_q=16, block_k=16, num_warps=4, num_stages=1),
            256: Tile(block_q=16, block_k=16, num_warps=4, num_stages=1),
        },
        "dkv": {
            64: Tile(block_q=16, block_k=16, num_warps=4, num_stages=1),
            128: Tile(block_q=16, block_k=16, num_warps=4, num_stages=1),
            256: Tile(block_q=16, block_k=16, num_warps=4, num_stages=1),
        },
    },
}
# So that the short sequences of tests take several.
INTERPRETER = Tile(block_q=16, block_k=16, num_warps=4, num_stages=1)
# Where the first product's left factor, which stays the same, is held in registers: shared memory
# has room for a stage more then, and is read half as much.
HELD_IN_REGISTERS = {("sm_90", "dq", 128), ("sm_90", "dkv", 256)}
