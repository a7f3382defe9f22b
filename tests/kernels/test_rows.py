"""Launch plans, without a GPU: they cover every row and channel once, within limits."""

import pytest

from fastpix2pix.kernels.rows import launch_plan

SHAPES = [  # rows, channels, groups, tiles, warps, why
    (1, 512, 1, 1, 1, "the bottleneck at batch 1: too little for more than one warp"),
    (4, 512, 1, 1, 1, "d8 at batch 1: one launch"),
    (256, 512, 1, 1, 8, "16 x 16 at batch 1: still one launch"),
    (257, 512, 1, 3, 8, "a row more: tiles of one block"),
    (961, 512, 2, 8, 8, "c4, joined"),
    (16384, 64, 64, 4, 8, "one group per image: tiles until the device is busy"),
    (16384, 512, 64, 1, 8, "groups and channels alone keep it busy"),
    (64 * 128 * 128, 64, 1, 256, 8, "d2 at batch 64: as many tiles as allowed"),
    (64 * 256 * 256, 3, 1, 256, 8, "RGB at batch 64"),
]


@pytest.mark.parametrize(("rows", "channels", "groups", "tiles", "warps", "why"), SHAPES)
def test_plans(rows, channels, groups, tiles, warps, why):
    plan = launch_plan(rows, channels, groups)
    assert (plan.tiles, plan.warps) == (tiles, warps)
    assert plan.grid[1:] == (tiles, groups)


def test_every_row_and_channel_has_one_program():
    for rows in [*range(1, 300), 961, 1024, 1025, 4099, 16384, 1 << 20]:
        for channels in (1, 3, 5, 33, 64, 512):
            for groups in (1, 2, 64):
                plan = launch_plan(rows, channels, groups)
                assert (plan.grid[0] - 1) * plan.block_channels < channels <= plan.grid[0] * plan.block_channels
                assert (plan.tiles - 1) * plan.tile_rows < rows <= plan.tiles * plan.tile_rows
                assert plan.tiles == 1 or plan.tile_rows % plan.block_rows == 0
                assert plan.tiles <= 256 and plan.grid[1] * plan.grid[2] <= 65535
                for size in (plan.block_rows, plan.block_channels, plan.warps):
                    assert size & (size - 1) == 0
                assert plan.block_rows * plan.block_channels <= 4096 and 1 <= plan.warps <= 8
