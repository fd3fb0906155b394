"""LLaVA-NeXT's images ("anyres"): tiles of an image, and which feature of the tiles each image token takes.

An image is shown as a whole, squeezed to one square tile, and again at the resolution of `pinpoints` that suits it
best, padded with black and cut into tiles. Its image tokens are the features of the first tile and, line by line over
the grid, those of the others that are not padding, each line closed by the model's `image_newline`. Tiles, counts and
order are those of transformers' LlavaNext; where it differs from the original (rounding of the padding), transformers'.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from llava_jax.data.images import CLIP
from llava_jax.types import InputError, ModelConfig, Pixels

NEWLINE = -1

Size = tuple[int, int]  # width and height, as PIL has them


@dataclasses.dataclass(frozen=True)
class Tiling:
    """`size`: pixels along a tile; `side`: patches along it; `pinpoints`: (height, width), multiples of `size`."""

    size: int
    side: int
    pinpoints: tuple[tuple[int, int], ...]
    pixels: Pixels = CLIP

    def tiles(self, sizes: Iterable[Size]) -> list[int]:
        """Count the tiles of each image, the whole one included."""
        return [1 + math.prod(self._grid(size)) for size in sizes]

    def tokens(self, sizes: Iterable[Size]) -> list[int]:
        """Count the image tokens of each image."""
        return [len(self._feature_index(size)) for size in sizes]

    def feature_index(self, sizes: Sequence[Size], first: int = 0) -> np.ndarray:
        """Return int32[t], what the image tokens take of images whose tiles follow each other from tile `first` on.

        Feature p of tile n is number n * side**2 + p, `image_newline` is NEWLINE.
        """
        found = [np.zeros(0, np.int32)]
        for size, tiles in zip(sizes, self.tiles(sizes), strict=True):
            feature_T = self._feature_index(size)
            found.append(np.where(feature_T == NEWLINE, NEWLINE, feature_T + first * self.side**2))
            first += tiles
        return np.concatenate(found).astype(np.int32)

    def cut(self, image: Image.Image) -> np.ndarray:
        """Return uint8[n, size, size, 3], the tiles of an RGB image, the whole one first."""
        rows, columns = self._grid(image.size)
        width, height = columns * self.size, rows * self.size
        by_width, by_height = width / image.width, height / image.height
        if by_width < by_height:
            fitted = width, min(math.ceil(image.height * by_width), height)
        else:
            fitted = min(math.ceil(image.width * by_height), width), height
        canvas = Image.new("RGB", (width, height))
        corner = (width - fitted[0]) // 2, (height - fitted[1]) // 2
        canvas.paste(image.resize(fitted, Image.Resampling.BICUBIC), corner)
        whole = np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        grid = np.asarray(canvas).reshape(rows, self.size, columns, self.size, 3).swapaxes(1, 2)
        return np.concatenate([whole[None], grid.reshape(-1, self.size, self.size, 3)])

    def _grid(self, size: Size) -> tuple[int, int]:
        """Return the rows and columns of tiles next to the whole one."""
        height, width = best_resolution(size, self.pinpoints)
        return height // self.size, width // self.size

    def _feature_index(self, size: Size) -> np.ndarray:
        """Return `feature_index` of one image whose first tile is number 0."""
        (width, height), (rows, columns), patches = size, self._grid(size), self.side**2
        tile_RC = 1 + np.arange(rows * columns).reshape(rows, columns)
        patch_AB = np.arange(patches).reshape(self.side, self.side)
        grid = tile_RC[:, None, :, None] * patches + patch_AB[None, :, None, :]
        lines_YX = grid.reshape(rows * self.side, columns * self.side)
        tall, wide = lines_YX.shape
        if width / height > wide / tall:
            padding = (tall - int(round(height * (wide / width), 7))) // 2
            lines_YX = lines_YX[padding : tall - padding]
        else:
            padding = (wide - int(round(width * (tall / height), 7))) // 2
            lines_YX = lines_YX[:, padding : wide - padding]
        lines_YX = np.pad(lines_YX, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([np.arange(patches), lines_YX.reshape(-1)])


def tiling(config: ModelConfig) -> Tiling:
    """Return how the images of a model with `pinpoints` are tiled."""
    vision = config.vision
    return Tiling(vision.image_size, vision.image_size // vision.patch_size, config.pinpoints, vision.pixels)


def best_resolution(size: Size, pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) that shows most of the image's pixels, of these the one with the least padding."""

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / size[0], pinpoint[0] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def spread(tokens: np.ndarray, image_token_id: int, features: np.ndarray) -> np.ndarray:
    """Return int32 shaped as `tokens`: `features` at the image tokens, in order; 0 elsewhere, where nobody looks."""
    feature_index = np.zeros(tokens.shape, np.int32)
    feature_index[tokens == image_token_id] = features
    return feature_index


def rows_of_tiles(
    tokens_BT: np.ndarray, pixels_NTCXY: np.ndarray | None, image_sizes: np.ndarray | None, config: ModelConfig
) -> tuple[np.ndarray | None, np.ndarray]:
    """Return a batch of transformers' LlavaNext processor for our model: tiles float32[B, N, X, Y, C], feature_index.

    `image_sizes` holds height and width of each image. Without images the tiles are None. Raises InputError where
    tokens, tiles and sizes do not belong together.
    """
    tiles = tiling(config)
    sizes = [] if image_sizes is None else [(int(width), int(height)) for height, width in np.asarray(image_sizes)]
    counts_N, tiles_N = np.array(tiles.tokens(sizes), int), tiles.tiles(sizes)
    slots_B = (tokens_BT == config.image_token_id).sum(axis=1)
    row_N = np.searchsorted(np.cumsum(slots_B), np.cumsum(counts_N)).clip(max=len(slots_B) - 1)
    if np.any(np.bincount(row_N, counts_N, len(slots_B)) != slots_B):
        raise InputError(
            f"image tokens (id {config.image_token_id}) a row are {slots_B.tolist()}; expected {counts_N.tolist()} for "
            f"images of width and height {sizes}"
        )
    feature_index_BT = np.zeros(tokens_BT.shape, np.int32)
    if not sizes:
        return None, feature_index_BT
    pixels, tile = np.asarray(pixels_NTCXY, np.float32), (3, tiles.size, tiles.size)
    if pixels.ndim != 5 or len(pixels) != len(sizes) or pixels.shape[1] < max(tiles_N) or pixels.shape[2:] != tile:
        raise InputError(f"pixels are {list(pixels.shape)}; expected {[len(sizes), max(tiles_N), *tile]}")
    rows = [np.flatnonzero(row_N == row) for row in range(len(slots_B))]
    most = max(sum(tiles_N[n] for n in row) for row in rows)
    pixels_BNXYC = np.zeros((len(rows), most, tiles.size, tiles.size, 3), np.float32)
    for b, row in enumerate(rows):
        features = tiles.feature_index([sizes[n] for n in row])
        feature_index_BT[b] = spread(tokens_BT[b], config.image_token_id, features)
        shown = [pixels[n, : tiles_N[n]].transpose(0, 2, 3, 1) for n in row]
        if shown:
            pixels_BNXYC[b, : sum(map(len, shown))] = np.concatenate(shown)
    return pixels_BNXYC, feature_index_BT
