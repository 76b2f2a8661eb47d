"""Compare the scores of images with those of other people's libraries, on the same features, in float64.

  python benchmarks/scores_against_libraries.py

Real digits against real digits, and against noised ones, in principal components of the pixels: Frechet distance by
torchmetrics and torch-fidelity, kernel distance (KID's estimator) by both, distances to the nearest image by
scikit-learn and prdc. No network is asked, so nothing is downloaded. Install the libraries in an environment of their
own:

  uv pip install torchmetrics torch-fidelity prdc

The last line is one JSON object: by score and library (ours, theirs, relative difference).
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from prdc.prdc import compute_nearest_neighbour_distances  # pyright: ignore[reportMissingImports]
from sklearn.neighbors import NearestNeighbors
from torch_fidelity.metric_fid import fid_statistics_to_metric  # pyright: ignore[reportMissingImports]
from torch_fidelity.metric_kid import kid_features_to_metric  # pyright: ignore[reportMissingImports]
from torchmetrics.image.fid import _compute_fid  # pyright: ignore[reportMissingImports]
from torchmetrics.image.kid import poly_mmd  # pyright: ignore[reportMissingImports]

from dblocks_jax.data.digits import load_digits
from dblocks_jax.tasks.generate.scores import (
    Moments,
    frechet_distance,
    nearest,
    noised,
    pixel_features,
    unbiased_mmd,
)

Row = tuple[str, str, float, float]  # score, library, ours, theirs


def frechet(name: str, x: np.ndarray, y: np.ndarray) -> list[Row]:
    """By eigenvalues (torchmetrics) and by a matrix's root (torch-fidelity)."""
    ours = frechet_distance(Moments.of(x), Moments.of(y))
    stats = [{"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)} for rows in (x, y)]
    tensors = [torch.from_numpy(stat[part]) for stat in stats for part in ("mu", "sigma")]
    by_root: Any = fid_statistics_to_metric(*stats, verbose=False)
    [value] = by_root.values()
    return [
        (f"frechet, {name}", "torchmetrics", ours, float(_compute_fid(*tensors))),
        (f"frechet, {name}", "torch-fidelity", ours, float(value)),
    ]


def kernel(name: str, x: np.ndarray, y: np.ndarray) -> list[Row]:
    """Of as many rows of each, all at once: so no library's random subsets come into it."""
    size = min(len(x), len(y))
    x, y = x[:size], y[:size]
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    found: dict[str, Any] = kid_features_to_metric(
        *tensors, kid_subsets=1, kid_subset_size=size, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, verbose=False, rng_seed=0,
    )  # fmt: skip
    [value] = [value for key, value in found.items() if key.endswith("mean")]
    ours = unbiased_mmd(x, y)
    return [
        (f"kernel, {name}", "torchmetrics", ours, float(poly_mmd(*tensors))),
        (f"kernel, {name}", "torch-fidelity", ours, float(value)),
    ]


def copies(samples: np.ndarray, train: np.ndarray, test: np.ndarray) -> list[Row]:
    """What is said of copies, and the distances that it is made of."""
    ours = nearest(samples, train, test)
    flat = [images.reshape(len(images), -1).astype(np.float64) for images in (samples, train, test)]

    def distances(queries: np.ndarray, images: np.ndarray, place: int = 0) -> np.ndarray:
        found = NearestNeighbors(n_neighbors=place + 1, algorithm="brute").fit(images).kneighbors(queries)[0]
        return found[:, place]

    among = compute_nearest_neighbour_distances(flat[2], 1)
    to_train, to_test = distances(flat[0], flat[1]), distances(flat[0], flat[2])
    of_tests = distances(flat[2], flat[1])
    return [
        ("nearest_ratio", "scikit-learn", ours.ratio, float(np.median(to_train / to_test))),
        ("nearest_ratio_expected", "scikit-learn, prdc", ours.expected_ratio, float(np.median(of_tests / among))),
        ("mean distance to train", "scikit-learn", float(ours.to_train.mean()), float(to_train.mean())),
        ("mean distance among tests", "prdc", float(ours.test_to_test.mean()), float(among.mean())),
    ]


def main() -> None:
    train, test = load_digits("train").pixels, load_digits("test").pixels
    features = pixel_features(train)
    spoiled = noised(test)
    rows: list[Row] = []
    for name, images in (("test images", test), ("noised", spoiled)):
        rows += frechet(name, features(images), features(train)) + kernel(name, features(images), features(train))
    rows += copies(spoiled, train, test)
    result = []
    for score, library, ours, theirs in rows:
        apart = abs(ours - theirs) / abs(theirs)
        print(f"{score:28s}{library:22s}{ours:16.9g}{theirs:16.9g}   {apart:.1e}")
        result.append({"score": score, "library": library, "ours": ours, "theirs": theirs, "relative": apart})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
