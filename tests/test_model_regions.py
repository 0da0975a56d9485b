import math

import pytest
import torch
from torch import Tensor

from glipv2.model.regions import crop_masks, region_features, region_levels


@pytest.mark.parametrize(
    ("side", "level"), [(3, 0), (111, 0), (223, 0), (224, 1), (447, 1), (448, 2), (5000, 4)]
)
def test_a_box_is_read_at_the_level_of_its_size(side: float, level: int) -> None:
    boxes = torch.tensor([[5.0, 7.0, 5.0 + side * 2, 7.0 + side / 2]])  # any aspect
    expected = min(max(math.floor(4 + math.log2(side / 224)) - 3, 0), 4)
    assert region_levels(boxes, 5).tolist() == [expected] == [level]
    assert region_levels(boxes, 3).tolist() == [min(level, 2)]


def slow_features(maps: list[Tensor], box: list[float], image: int, cells: int) -> Tensor:
    """ROI features one look at a time: 2 x 2 looks a cell, bilinear between location centres."""
    x0, y0, x1, y1 = box
    side = math.sqrt((x1 - x0) * (y1 - y0))
    level = min(max(math.floor(4 + math.log2(side / 224)) - 3, 0), len(maps) - 1)
    stride, grid = 8 * 2**level, maps[level][image]
    height, width = grid.shape[1:]

    def look(pixel_y: float, pixel_x: float) -> Tensor:
        y, x = pixel_y / stride - 0.5, pixel_x / stride - 0.5
        if y < -1 or x < -1 or y > height or x > width:
            return torch.zeros(len(grid), dtype=grid.dtype)
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        total = torch.zeros(len(grid), dtype=grid.dtype)
        for j in {math.floor(y), math.ceil(y)}:
            for i in {math.floor(x), math.ceil(x)}:
                total += (1 - abs(y - j)) * (1 - abs(x - i)) * grid[:, j, i]
        return total

    result = torch.zeros(len(grid), cells, cells, dtype=grid.dtype)
    for row in range(cells):
        for column in range(cells):
            for a in (0.25, 0.75):
                for b in (0.25, 0.75):
                    y = y0 + (row + a) * (y1 - y0) / cells
                    x = x0 + (column + b) * (x1 - x0) / cells
                    result[:, row, column] += look(y, x) / 4
    return result


def test_region_features_equal_a_loop_over_looks() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = [
        torch.randn(2, 3, 64 // 2**level, 96 // 2**level, generator=generator, dtype=torch.double)
        for level in range(3)
    ]
    boxes = [
        [10.3, 20.8, 75.1, 66.6],
        [0.0, 0.0, 768.0, 512.0],  # all of the image: the coarsest level
        [-15.5, 300.2, 260.0, 519.7],  # over the edge
        [500.0, 100.0, 503.0, 101.5],
        [200.4, 10.0, 500.9, 300.0],
    ]
    image = torch.tensor([0, 1, 1, 0, 1])
    found = region_features(maps, (8, 16, 32), torch.tensor(boxes, dtype=torch.double), image, 6)
    for row, box in enumerate(boxes):
        torch.testing.assert_close(found[row], slow_features(maps, box, int(image[row]), 6))


def test_region_features_sit_where_their_pixels_are() -> None:
    """On maps that hold the coordinates of their locations' centres, cells read their own."""
    maps = []
    for level in range(3):
        stride = 8 * 2**level
        y, x = ((torch.arange(512 // stride) + 0.5) * stride for _ in range(2))
        maps.append(torch.stack(torch.meshgrid(y, x, indexing="ij"))[None])
    boxes = torch.tensor([[40.0, 64.0, 96.0, 92.0], [100.0, 30.0, 350.0, 400.0]])
    found = region_features(maps, (8, 16, 32), boxes, torch.zeros(2, dtype=torch.int64), 14)
    for cells, (x0, y0, x1, y1) in zip(found, boxes.tolist(), strict=True):
        step = (torch.arange(14) + 0.5) / 14
        torch.testing.assert_close(cells[0], (y0 + step * (y1 - y0))[:, None].expand(14, 14))
        torch.testing.assert_close(cells[1], (x0 + step * (x1 - x0)).expand(14, 14))


def test_a_mask_is_cut_to_another_region_where_it_stands_in_the_image() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[0, :20, 10:] = 1  # in the image: rows 100 to 120, columns 60 to 90
    frame = torch.tensor([[50.0, 100.0, 90.0, 140.0]])
    region = torch.tensor([[40.0, 96.0, 80.0, 136.0]])
    step = torch.arange(20) * 2 + 1.0
    inside_y, inside_x = (96 + step > 100) & (96 + step < 120), 40 + step > 60
    expected = (inside_y[:, None] & inside_x).float()
    assert torch.equal(crop_masks(mask, frame, region, 20)[0], expected)
    assert torch.equal(crop_masks(mask, frame, frame, 20)[0], mask[0, ::2, ::2].float())
