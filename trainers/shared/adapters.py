"""Small networks that bring one network's features to the size and width of another's. A chapter of common.py.

Names of parameters are those of github.com/HobbitLong/RepDistiller @ b84f547.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]


class MapRegressor(nn.Module):
    """A feature map of shape (C, H, W) to another's shape by one convolution and BatchNorm, with ReLU if asked for.

    Raises SystemExit for sizes that one convolution does not lead to: smaller and not half of it.
    """

    def __init__(self, ours: Shape, theirs: Shape, relu: bool):
        super().__init__()
        (width, side, _), (goal_width, goal, _) = ours, theirs
        if side == 2 * goal:
            self.conv = nn.Conv2d(width, goal_width, 3, 2, 1)
        elif 2 * side == goal:
            self.conv = nn.ConvTranspose2d(width, goal_width, 4, 2, 1)
        elif side >= goal:
            self.conv = nn.Conv2d(width, goal_width, 1 + side - goal)
        else:
            raise SystemExit(
                f"--student: its feature map of {side} px is neither half of the teacher's {goal} px nor larger: "
                "choose another student or --method"
            )
        self.bn, self.relu = nn.BatchNorm2d(goal_width), relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class GaussianRegressor(nn.Module):
    """A Gaussian of another network's map, from (B, C, H, W) and that map: its mean, (C',) raw scales, and the map again."""

    def __init__(self, width: int, goal: int):
        super().__init__()
        first, *others = (nn.Conv2d(w, goal, 1, bias=False) for w in (width, goal, goal))
        self.regressor = nn.Sequential(first, nn.ReLU(), others[0], nn.ReLU(), others[1])
        self.log_scale = nn.Parameter(torch.full((goal,), math.log(math.expm1(5.0 - 1e-5))))

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.regressor(x), self.log_scale, other


class UnitEmbedding(nn.Module):
    """One Linear to vectors of unit length, (B, D) -> (B, D')."""

    def __init__(self, width: int, goal: int):
        super().__init__()
        self.linear = nn.Linear(width, goal)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear(x), dim=1)


def conv_stack(widths: Shape, layer: type, norm: type = nn.Identity) -> nn.Sequential:
    """3x3 layers (convolutions or transposed ones) from width to width, each with `norm` and LeakyReLU."""
    rows = [(layer(a, b, 3, 1, 1), norm(b), nn.LeakyReLU(0.1, inplace=True)) for a, b in pairwise(widths)]
    return nn.Sequential(*(module for row in rows for module in row))


def same_size(*maps: Tensor) -> list[Tensor]:
    """Feature maps (B, C, H, W), the larger ones pooled to the smallest one's height and width."""
    size = min(f.shape[2:] for f in maps)
    return [f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in maps]
