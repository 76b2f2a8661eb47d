"""Scores of images against scipy, scikit-learn, closed forms, and what mathematics forces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import ortho_group
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors

from dblocks_jax.run.errors import UserError
from dblocks_jax.tasks.generate import scores
from dblocks_jax.tasks.generate.scores import (
    Moments,
    frechet_distance,
    kernel_distance,
    nearest,
    noised,
    pixel_features,
    unbiased_mmd,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def pictures(seed: int, count: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 1), dtype=np.uint8)


# Moments and the Frechet distance.


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda counts: sum(counts) >= 2))
@settings(max_examples=20, deadline=None)
def test_moments_do_not_depend_on_the_batches(counts):
    rows = normal(0, sum(counts), 3) + 1e6  # far from zero, where plain sums of squares lose ten digits
    moments = Moments.of(rows[:0])
    for batch in np.split(rows, np.cumsum(counts)[:-1]):
        moments = moments.add(batch)
    assert moments.count == len(rows)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.T), rtol=0, atol=1e-8)


def test_moments_of_small_floats_and_integers_are_summed_in_float64():
    rows = np.full((4096, 1), 16.0, np.float16)  # their float16 sum is no longer a number of that type
    rows[0] = 17
    assert Moments.of(rows).mean[0] == 16 + 1 / 4096
    assert Moments.of(np.full((4, 1), 200, np.uint8)).mean[0] == 200


def moments_with(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    return Moments(11, mean, covariance * 10)


def test_frechet_distance_is_that_of_scipy_for_any_covariances():
    for seed in range(5):
        a, b = normal(seed, 40, 7), normal(seed + 10, 30, 7) @ normal(seed + 20, 7, 7) + 1
        found = frechet_distance(Moments.of(a), Moments.of(b))
        both = sqrtm(np.cov(a.T) @ np.cov(b.T))
        expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * both.real)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_frechet_distance_between_gaussians_that_share_their_axes():
    """Then it is the squared distance of the means and of the standard deviations along each axis."""
    axes = ortho_group.rvs(6, random_state=0)
    a, b = np.array([3, 2, 1, 1, 0, 0.0]), np.array([1, 2, 0, 5, 0, 2.0])  # singular, in different directions too
    shift = np.arange(6.0)
    found = frechet_distance(
        moments_with(np.zeros(6), (axes * a**2) @ axes.T), moments_with(shift, (axes * b**2) @ axes.T)
    )
    np.testing.assert_allclose(found, np.sum(shift**2) + np.sum((a - b) ** 2), rtol=1e-12)


def test_frechet_distance_of_fewer_images_than_features_to_themselves_is_zero():
    """scipy's root of this singular product is wrong by 1e-6, or has an imaginary part."""
    few = Moments.of(normal(0, 5, 40))
    assert frechet_distance(few, few) < 1e-12
    orthogonal = Moments.of(np.concatenate([normal(1, 5, 20), np.zeros((5, 20))], axis=1))
    other = Moments.of(np.concatenate([np.zeros((5, 20)), normal(2, 5, 20)], axis=1))
    parts = [np.sum((orthogonal.mean - other.mean) ** 2), *(np.trace(m.covariance) for m in (orthogonal, other))]
    np.testing.assert_allclose(frechet_distance(orthogonal, other), sum(parts), rtol=1e-12)


def test_frechet_distance_is_symmetric_and_blind_to_rotation():
    a, b, rotation = normal(0, 30, 5), 2 * normal(1, 20, 5) + 1, ortho_group.rvs(5, random_state=1)
    found = frechet_distance(Moments.of(a), Moments.of(b))
    np.testing.assert_allclose(frechet_distance(Moments.of(b), Moments.of(a)), found, rtol=1e-12)
    np.testing.assert_allclose(frechet_distance(Moments.of(a @ rotation), Moments.of(b @ rotation)), found, rtol=1e-12)


def test_frechet_distance_of_a_diverged_model_is_not_a_number():
    broken = normal(0, 9, 3)
    broken[4, 1] = np.inf
    with np.errstate(invalid="ignore"):
        assert np.isnan(frechet_distance(Moments.of(broken), Moments.of(normal(1, 9, 3))))


def test_frechet_distance_says_what_it_cannot_compare():
    with pytest.raises(UserError, match="2 images at least, not 1"):
        frechet_distance(Moments.of(normal(0, 1, 3)), Moments.of(normal(0, 9, 3)))
    with pytest.raises(UserError, match="width 3 cannot be compared with others of width 4"):
        frechet_distance(Moments.of(normal(0, 9, 3)), Moments.of(normal(0, 9, 4)))


# The kernel distance.


def test_mmd_is_that_of_scikit_learns_kernel():
    x, y = normal(0, 12, 5), normal(1, 9, 5) + 0.3
    kxx, kyy, kxy = polynomial_kernel(x), polynomial_kernel(y), polynomial_kernel(x, y)  # (x.y / k + 1)^3 by default
    pairs = ~np.eye(12, dtype=bool), ~np.eye(9, dtype=bool)
    expected = kxx[pairs[0]].mean() + kyy[pairs[1]].mean() - 2 * kxy.mean()
    np.testing.assert_allclose(unbiased_mmd(x, y), expected, rtol=1e-12)


def test_mmd_between_draws_of_one_distribution_is_zero_on_average():
    values = [unbiased_mmd(normal(2 * i, 10, 3), normal(2 * i + 1, 15, 3)) for i in range(500)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert error < 0.05  # with each row beside itself the mean would be 1.8
    assert min(values) < 0


def test_mmd_against_its_expectation():
    """One feature, N(0, 1) against N(m, 1): (xy + 1)^3 is 1 + 3 xy + 3 x^2 y^2 + x^3 y^3 with known moments."""
    m = 0.7
    moments = np.array([[1, 0, 1, 0], [1, m, 1 + m**2, m**3 + 3 * m]])  # of order 0 to 3
    expected = np.sum([1, 3, 3, 1] * (moments[0] - moments[1]) ** 2)
    values = [unbiased_mmd(normal(2 * i, 40, 1), normal(2 * i + 1, 40, 1) + m) for i in range(500)]
    assert abs(np.mean(values) - expected) < 3 * np.std(values) / np.sqrt(len(values))


def test_kernel_distance_is_a_function_of_the_seed_and_has_a_spread():
    x, y = normal(0, 60, 4), normal(1, 50, 4) + 1
    first = kernel_distance(x, y, num_subsets=50, subset_size=20)
    assert first == kernel_distance(x, y, num_subsets=50, subset_size=20)
    assert first != kernel_distance(x, y, num_subsets=50, subset_size=20, seed=1)
    whole = unbiased_mmd(x, y)  # what subsets have on average
    assert abs(first.mean - whole) < 4 * first.spread / np.sqrt(50)
    assert 0 < first.spread < whole


def test_no_row_is_twice_in_a_subset():
    """Beside itself a wide row counts (1 + 1)^3, beside another 1: drawn twice, they would show."""
    x, y = normal(0, 60, 100), normal(1, 60, 100)
    found = kernel_distance(x, y, num_subsets=50, subset_size=30)
    assert abs(found.mean - unbiased_mmd(x, y)) < 0.05  # (1 + 1)^3 - 1 at two pairs of 60 would be 0.23


def test_kernel_distance_of_all_rows_has_a_spread_too():
    assert kernel_distance(normal(0, 40, 4), normal(1, 40, 4), num_subsets=9).spread > 0
    with pytest.raises(UserError, match="4 images at least on each side, not 40 and 3"):
        kernel_distance(normal(0, 40, 4), normal(1, 3, 4))


# Features of pixels.


@pytest.mark.parametrize("count", [50, 10], ids=["more images than pixels", "fewer"])
def test_pixel_features_are_scikit_learns_components_up_to_sign_and_scale(count):
    train, new = pictures(0, count), pictures(1, 7)
    features = pixel_features(train, 6)
    theirs = PCA(6, svd_solver="full").fit(train.reshape(count, -1).astype(float))
    expected = theirs.transform(new.reshape(7, -1).astype(float)) / np.sqrt(theirs.explained_variance_.mean())
    np.testing.assert_allclose(np.abs(features(new)), np.abs(expected), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(Moments.of(features(train)).covariance.trace(), 6, rtol=1e-12)
    np.testing.assert_allclose(features(train).mean(axis=0), 0, atol=1e-12)


def test_pixel_features_do_not_depend_on_the_units():
    train, new = pictures(0, 30), pictures(1, 5)
    in_units = pixel_features(train / 127.5 - 1, 4)(new / 127.5 - 1)
    np.testing.assert_allclose(np.abs(in_units), np.abs(pixel_features(train, 4)(new)), rtol=1e-9)


def test_there_are_no_more_pixel_features_than_the_images_vary_in():
    assert pixel_features(pictures(0, 50)).components.shape == (16, 16)
    assert pixel_features(pictures(0, 10)).components.shape == (9, 16)
    twice = np.concatenate([pictures(0, 4), pictures(0, 4)])
    assert pixel_features(twice).components.shape == (3, 16)
    assert pixel_features(pictures(0, 10))(pictures(1, 0)).shape == (0, 9)
    for same in (np.full((9, 4, 4, 1), 77, np.uint8), np.full((9, 4, 4, 1), 0.1, np.float32), pictures(0, 1)):
        with pytest.raises(UserError, match="training images"):
            pixel_features(same)


def test_pixel_features_of_many_large_images_come_from_some(monkeypatch):
    train = pictures(0, 40)
    monkeypatch.setattr(scores, "FIT_VALUES", 8 * 16)
    spaced = train[[0, 5, 11, 16, 22, 27, 33, 39]]
    np.testing.assert_array_equal(pixel_features(train, 3).mean, spaced.reshape(8, 16).mean(axis=0))


# Copies.


@pytest.mark.parametrize("chunk", [5, 2048])
def test_nearest_images_are_those_of_scikit_learn(chunk, monkeypatch):
    monkeypatch.setattr(scores, "CHUNK_IMAGES", chunk)
    samples, train, test = pictures(0, 23), pictures(1, 41), pictures(2, 17)
    found = nearest(samples, train, test)

    def theirs(queries: np.ndarray, images: np.ndarray, neighbours: int = 1) -> tuple[np.ndarray, np.ndarray]:
        rows = images.reshape(len(images), -1).astype(float)
        search = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(rows)
        distances, indices = search.kneighbors(queries.reshape(len(queries), -1).astype(float))
        return distances[:, -1], indices[:, -1]

    distances, indices = theirs(samples, train)
    np.testing.assert_array_equal(found.train_index, indices)
    np.testing.assert_allclose(found.to_train, distances)
    np.testing.assert_allclose(found.to_test, theirs(samples, test)[0])
    np.testing.assert_allclose(found.test_to_train, theirs(test, train)[0])
    np.testing.assert_allclose(found.test_to_test, theirs(test, test, neighbours=2)[0])
    np.testing.assert_allclose(found.ratio, np.median(distances / theirs(samples, test)[0]))
    order = np.argsort(distances)[:4]
    np.testing.assert_array_equal(found.closest(4), np.stack([order, indices[order]], axis=1))


def test_large_images_are_told_apart_by_a_step_of_one_pixel():
    """Squared distances of 1 and 2, differences of sums near 10^8, where float32 has every eighth number."""
    rng = np.random.default_rng(0)
    samples = np.full((1, 80, 80, 1), 1, np.uint8)
    train = np.repeat(samples, 40, axis=0)
    for i, image in enumerate(train.reshape(40, 6400)):
        image[rng.permutation(6400)[: 1 if i == 23 else 2]] = 2 * rng.integers(2)
    assert nearest(samples, train, train).train_index == [23]


def test_of_equally_near_images_the_first_is_named(monkeypatch):
    monkeypatch.setattr(scores, "CHUNK_IMAGES", 4)
    some = pictures(0, 6)
    found = nearest(some, np.concatenate([some, some]), some)
    assert found.train_index.tolist() == [0, 1, 2, 3, 4, 5]


def test_copies_are_found():
    train, test = pictures(0, 60), pictures(1, 1000)
    fresh = nearest(pictures(2, 1000), train, test)
    assert abs(fresh.share_close - 0.05) < 0.03 and abs(fresh.ratio - fresh.expected_ratio) < 0.03
    some = pictures(3, 20)
    some[[4, 11]] = train[[7, 50]]
    found = nearest(some, train, test)
    assert sorted(found.closest(2).tolist()) == [[4, 7], [11, 50]] and found.to_train[4] == 0
    all_copied = nearest(train[::2], train, test)
    assert all_copied.ratio == 0 and all_copied.share_close == 1
    assert nearest(test, train, test).ratio == np.inf


def test_an_image_that_is_in_both_splits_is_a_copy_of_neither():
    train, test = pictures(0, 6), pictures(1, 6)
    train[2] = test[4]
    assert nearest(test[4:5], train, test).ratio == 1


def test_copies_are_not_looked_for_where_there_is_nothing_to_compare():
    some = pictures(0, 3)
    for arguments in ((some[:0], some, some), (some, some[:0], some), (some, some, some[:1])):
        with pytest.raises(UserError, match="1 sample, 1 training image and 2 test images at least"):
            nearest(*arguments)
    with pytest.raises(UserError, match=r"different shapes: \[4, 4, 1\], \[5, 5, 1\], \[4, 4, 1\]"):
        nearest(some, pictures(0, 3, size=5), some)


# Floor and ceiling.


def test_noise_has_the_size_that_was_asked_for():
    grey = np.full((100, 8, 8, 1), 127, np.uint8)
    noisy = noised(grey, 0.2, seed=3)
    assert noisy.dtype == np.uint8 and np.array_equal(noisy, noised(grey, 0.2, seed=3))
    np.testing.assert_allclose(noisy.std(), 0.2 * 127.5, rtol=0.03)
    np.testing.assert_allclose(noisy.mean(), 127, atol=1)
    np.testing.assert_allclose(noised(np.zeros((100, 8, 8, 4), np.float32), 3.0).std(), 3, rtol=0.03)
    black, half = noised(np.zeros((100, 8, 8, 1), np.uint8), 0.2), noised(np.full((100, 8, 8, 1), 255, np.uint8), 0.2)
    assert 0.4 < np.mean(black == 0) < 0.6 and 0.4 < np.mean(half == 255) < 0.6  # no value wraps round


def test_the_floor_is_below_the_ceiling():
    """Digits: real test images are nearer to the training images than noised ones, by both distances."""
    from sklearn.datasets import load_digits

    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[..., None]
    images = np.random.default_rng(0).permutation(images)
    train, test = images[:1400], images[1400:]
    features = pixel_features(train, 20)
    reference = features(train)
    floor, ceiling = features(test), features(noised(test))
    near, far = (frechet_distance(Moments.of(rows), Moments.of(reference)) for rows in (floor, ceiling))
    assert 2 * near < far
    near, far = (kernel_distance(rows, reference, num_subsets=10) for rows in (floor, ceiling))
    assert near.mean + near.spread < far.mean
