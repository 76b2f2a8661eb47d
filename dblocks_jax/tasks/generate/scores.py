"""How like real images are generated ones? Distances between features [n, k] or images [n, ...], in float64.

None of these is FID, whose features come from one network of 2015. Here the features are the caller's: a classifier's,
or those of `pixel_features`. Such a distance says little alone, so give it beside its floor, real test images against
real training images, and its ceiling, `noised` test images against training images. A Frechet distance is larger the
fewer images it is made of: compare equal numbers.

    images ──▶ features ──▶ Moments.add ──▶ frechet_distance    mean and covariance; running sums, any number of images
                        └─▶ kernel_distance                     unbiased for few images, with a spread
           └─▶ nearest                                          are they copies of training images?
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int, Num, UInt8

from dblocks_jax.run.errors import UserError

Images = Num[np.ndarray, "_ ..."]

FIT_VALUES = 2**26  # pixels that a principal component analysis is made of at most: 512 MiB in float64
CHUNK_VALUES, CHUNK_IMAGES = 2**23, 2048  # what is compared at once: 64 MiB of pixels, 32 MiB of distances
CLOSE = 0.05  # the share of real test images that are called close to a training image


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (the sum of centred outer products) of rows that come batch by batch.

    Sums about the mean, not about zero: features far from zero keep their digits.
    """

    count: int
    mean: Float64[np.ndarray, " k"] = field(repr=False)
    scatter: Float64[np.ndarray, "k k"] = field(repr=False)

    @classmethod
    def of(cls, features: Num[np.ndarray, "n k"]) -> "Moments":
        """Those of these rows, of which there may be none."""
        rows = features.astype(np.float64)
        mean = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def add(self, features: Num[np.ndarray, "n k"]) -> "Moments":
        """The moments of these rows and all before."""
        new = Moments.of(features)
        count = self.count + new.count
        if not count:
            return self
        shift = new.mean - self.mean
        between = np.outer(shift, shift) * (self.count * new.count / count)
        return Moments(count, self.mean + shift * (new.count / count), self.scatter + new.scatter + between)

    @property
    def covariance(self) -> Float64[np.ndarray, "k k"]:
        """The unbiased estimate, scatter / (count - 1).

        Raises:
          UserError: there are less than two rows.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs the features of 2 images at least, not {self.count}")
        return self.scatter / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet distance between the Gaussians of these moments; NaN where a feature was not finite.

    |mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)). The last trace is the sum of the singular values of
    C_a^(1/2) C_b^(1/2), so it is real, and covariances may be singular (fewer images than features).

    Raises:
      UserError: the moments are of different features, or of less than two images.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of width {len(a.mean)} cannot be compared with others of width {len(b.mean)}")
    covariances = a.covariance, b.covariance
    if not all(np.isfinite(part).all() for part in (a.mean, b.mean, *covariances)):
        return float("nan")
    roots = [_root(covariance) for covariance in covariances]
    common = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    apart = np.sum((a.mean - b.mean) ** 2)
    return max(0.0, float(apart + sum(np.trace(covariance) for covariance in covariances) - 2 * common))


def _root(covariance: Float64[np.ndarray, "k k"]) -> Float64[np.ndarray, "k k"]:
    """The symmetric square root. Eigenvalues that are zero but for rounding are zero: their roots would be 1e-8."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * np.abs(values).max()
    return (vectors * np.sqrt(np.where(values > rounding, values, 0.0))) @ vectors.T


class KernelDistance(NamedTuple):
    """Mean over subsets, and their standard deviation: how far one subset's value is from another's."""

    mean: float
    spread: float


def kernel_distance(
    x: Num[np.ndarray, "n k"],
    y: Num[np.ndarray, "m k"],
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """KID: `unbiased_mmd` between random subsets of both, a function of the seed.

    A subset is at most half of the rows: larger ones would be nearly the same each time, and show no spread.

    Raises:
      UserError: one of them has less than four rows.
    """
    size = min(subset_size, len(x) // 2, len(y) // 2)
    if size < 2:
        raise UserError(f"a kernel distance needs 4 images at least on each side, not {len(x)} and {len(y)}")
    rng = np.random.default_rng(seed)

    def subset(rows: Num[np.ndarray, "n k"]) -> Float64[np.ndarray, "size k"]:
        return rows[rng.choice(len(rows), size, replace=False)].astype(np.float64)

    values = [unbiased_mmd(subset(x), subset(y)) for _ in range(num_subsets)]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def unbiased_mmd(x: Num[np.ndarray, "n k"], y: Num[np.ndarray, "m k"]) -> float:
    """Squared maximum mean discrepancy under the kernel (x.y / k + 1)^3. Between equal distributions its mean is 0."""
    x, y = x.astype(np.float64, copy=False), y.astype(np.float64, copy=False)
    between = _sum_of_kernel(x, y) / (len(x) * len(y))
    return float(_mean_of_pairs(x) + _mean_of_pairs(y) - 2 * between)


def _sum_of_kernel(x: Float64[np.ndarray, "n k"], y: Float64[np.ndarray, "m k"]) -> float:
    """Over all pairs. Two products and a dot product take a fraction of numpy's power."""
    base = (x @ (y / y.shape[1]).T).reshape(-1)
    base += 1
    return float(np.dot(base * base, base))


def _mean_of_pairs(rows: Float64[np.ndarray, "n k"]) -> float:
    """The kernel over pairs of different rows: a row beside itself is what makes the plain mean biased."""
    itself = np.sum((np.sum(rows**2, axis=1) / rows.shape[1] + 1) ** 3)
    return (_sum_of_kernel(rows, rows) - float(itself)) / (len(rows) * (len(rows) - 1))


@dataclass(frozen=True)
class PixelFeatures:
    """Images to their principal components, all divided by one number: mean variance 1 over the training images."""

    mean: Float64[np.ndarray, " pixels"] = field(repr=False)
    components: Float64[np.ndarray, "k pixels"] = field(repr=False)

    def __call__(self, images: Images) -> Float64[np.ndarray, "n k"]:
        """Features of images in the units of the training images."""
        found = [_rows(images[part]) @ self.components.T for part in _chunks(len(images), len(self.mean))]
        return np.concatenate([np.empty((0, len(self.components))), *found]) - self.components @ self.mean


def pixel_features(train: Images, num_components: int = 64) -> PixelFeatures:
    """The principal components of training images with the largest variance, the largest first.

    Fewer where the images vary in fewer ways: at most one less than images. Of many large images some are taken, evenly
    spaced.

    Raises:
      UserError: there are less than two images, or all are the same.
    """
    pixels = int(np.prod(train.shape[1:]))
    count = min(len(train), max(num_components + 1, FIT_VALUES // pixels))
    if count < 2:
        raise UserError(f"principal components need 2 training images at least, not {count}")
    rows = _rows(train[np.linspace(0, len(train) - 1, count).astype(int)])
    mean = rows.mean(axis=0)
    rows -= mean
    wide = pixels > count  # then the images' inner products have the same eigenvalues, and are fewer
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    eps = np.finfo(np.float64).eps
    rounding = max(len(values) * eps * values[-1], count * np.sum((count * eps * mean) ** 2))
    rank = int(np.sum(values > rounding))
    if not rank:
        raise UserError(f"the {count} training images are all the same: their pixels have no principal components")
    kept = slice(-1, -1 - min(num_components, rank), -1)
    values, axes = values[kept], vectors.T[kept]
    if wide:
        axes = (axes @ rows) / np.sqrt(values)[:, None]
    return PixelFeatures(mean, axes / np.sqrt(values.mean() / (count - 1)))


@dataclass(frozen=True)
class Nearest:
    """How near samples are to training images, and how near real test images are to them.

    Distances are Euclidean, over all pixels, in the images' units.
    """

    to_train: Float64[np.ndarray, " samples"] = field(repr=False)
    to_test: Float64[np.ndarray, " samples"] = field(repr=False)
    train_index: Int[np.ndarray, " samples"] = field(repr=False)  # the nearest training image of each sample
    test_to_train: Float64[np.ndarray, " tests"] = field(repr=False)
    test_to_test: Float64[np.ndarray, " tests"] = field(repr=False)  # to the nearest other test image

    @property
    def ratio(self) -> float:
        """The median of distance to training image over distance to test image. Copies have 0."""
        return _median_ratio(self.to_train, self.to_test)

    @property
    def expected_ratio(self) -> float:
        """The same for the test images among themselves. Below 1 where there are more training than test images."""
        return _median_ratio(self.test_to_train, self.test_to_test)

    @property
    def share_close(self) -> float:
        """The share of samples as close to a training image as the closest 5 % of test images are: 0.05 expected."""
        return float(np.mean(self.to_train <= np.quantile(self.test_to_train, CLOSE)))

    def closest(self, count: int) -> Int[np.ndarray, "pairs 2"]:
        """(sample, its nearest training image) of the pairs with the smallest distances, the closest first."""
        samples = np.argsort(self.to_train, kind="stable")[:count]
        return np.stack([samples, self.train_index[samples]], axis=1)


def nearest(samples: Images, train: Images, test: Images) -> Nearest:
    """Are samples copies of training images? Few are in float64 at a time, however many there are.

    Raises:
      UserError: no samples, no training images, less than two test images, or shapes that differ.
    """
    if not len(samples) or not len(train) or len(test) < 2:
        raise UserError(
            f"to look for copies takes 1 sample, 1 training image and 2 test images at least, not {len(samples)}, "
            f"{len(train)} and {len(test)}"
        )
    if not samples.shape[1:] == train.shape[1:] == test.shape[1:]:
        shapes = [list(images.shape[1:]) for images in (samples, train, test)]
        raise UserError(f"samples, training and test images have different shapes: {', '.join(map(str, shapes))}")
    train_index = _nearest_index(samples, train)
    return Nearest(
        to_train=_distances(samples, train[train_index]),
        to_test=_distances(samples, test[_nearest_index(samples, test)]),
        train_index=train_index,
        test_to_train=_distances(test, train[_nearest_index(test, train)]),
        test_to_test=_distances(test, test[_nearest_index(test, test, other=True)]),
    )


class Made(NamedTuple):
    """Samples that were scored. Sample i has class labels[i] and the noise of position i."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, " n"]
    copies: Nearest


def noised(images: Images, sigma: float = 0.5, seed: int = 0) -> Images:
    """Images with normal noise, for a score's ceiling; of the same type.

    `sigma` is in units of [-1, 1] for uint8 images, so that 0.5 is about as much noise as there is image; these are
    rounded and cut off at black and white. It is in the images' own units for floats.
    """
    noise = np.random.default_rng(seed).standard_normal(images.shape, np.float32)
    if images.dtype == np.uint8:
        return np.clip(np.rint(images + noise * np.float32(sigma * 127.5)), 0, 255).astype(np.uint8)
    return (images + noise * sigma).astype(images.dtype)


def _median_ratio(above: Float64[np.ndarray, " n"], below: Float64[np.ndarray, " n"]) -> float:
    """Of two zeros the ratio is 1: as near to the one as to the other."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(above == below, 1.0, above / below)
    return float(np.median(ratios))


def _nearest_index(queries: Images, images: Images, *, other: bool = False) -> Int[np.ndarray, " queries"]:
    """The nearest of `images` to each query, the first of equals; `other`: queries are the images, never their own.

    By |image|^2 - 2 image.query, which orders as the distance does, and is exact for uint8.
    """
    pixels = int(np.prod(images.shape[1:]))
    flat = _centred if queries.dtype == images.dtype == np.uint8 else _rows
    found = np.zeros(len(queries), np.int64)
    for rows in _chunks(len(queries), pixels):
        best = np.full(rows.stop - rows.start, np.inf)
        asked = flat(queries[rows])
        for columns in _chunks(len(images), pixels):
            offered = flat(images[columns])
            order = np.sum(offered**2, axis=1, dtype=np.float64) - 2 * _products(asked, offered)
            if other and rows == columns:  # both are cut into the same chunks
                np.fill_diagonal(order, np.inf)
            at = order.argmin(axis=1)
            values = order[np.arange(len(at)), at]
            found[rows] = np.where(values < best, columns.start + at, found[rows])
            best = np.minimum(best, values)
    return found


def _centred(images: UInt8[np.ndarray, "n ..."]) -> Float32[np.ndarray, "n pixels"]:
    """Distances do not change, and a product of two pixels is at most 2^14."""
    return images.reshape(len(images), -1).astype(np.float32) - 128


def _products(a: Float[np.ndarray, "n pixels"], b: Float[np.ndarray, "m pixels"]) -> Float64[np.ndarray, "n m"]:
    """a @ b.T. Of `_centred` rows it is exact, at twice the speed of float64: 2^10 products add up to 2^24 at most, and
    up to there float32 has every whole number."""
    size = a.shape[1] if a.dtype == np.float64 else 2**10
    total = np.zeros((len(a), len(b)))
    for start in range(0, a.shape[1], size):
        total += a[:, start : start + size] @ b[:, start : start + size].T
    return total


def _distances(a: Images, b: Images) -> Float64[np.ndarray, " n"]:
    """Between images in the same place. From differences, so that equal images are 0 apart."""
    parts = _chunks(len(a), int(np.prod(a.shape[1:])))
    return np.concatenate([np.linalg.norm(_rows(a[part]) - _rows(b[part]), axis=1) for part in parts])


def _rows(images: Images) -> Float64[np.ndarray, "n pixels"]:
    return images.reshape(len(images), -1).astype(np.float64)


def _chunks(count: int, pixels: int) -> Iterator[slice]:
    size = max(1, min(CHUNK_IMAGES, CHUNK_VALUES // pixels))
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
