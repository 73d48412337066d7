"""Groups of patches: published k-means, any number of patches, and the file that keeps them."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from gmmamba.grouping import (
    METHODS,
    group_cohort,
    group_cohort_by_features,
    group_coords,
    group_features,
    parse_grouping,
)
from slidestore import StoreError, write_store
from slidestore.groups import read_groups
from tests.gmmamba.synthetic import ENCODER, attributes_of


def grid(N: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 40, (N, 2)) * 224).astype(np.int32)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=20)
@given(N=st.integers(1, 50), n_groups=st.integers(1, 20))
def test_any_slide(method: str, N: int, n_groups: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # k-means warns where places are fewer than groups
        labels = group_coords(grid(N), method, n_groups)
    assert labels.shape == (N,)
    assert labels.dtype == np.int16
    assert set(labels) == set(range(labels.max() + 1))
    assert labels.max() < min(N, n_groups)


def test_patches_on_one_place_are_one_group() -> None:
    assert set(group_coords(np.full((8, 2), 224), "location", 5)) == {0}


def test_location_is_the_published_k_means() -> None:
    coords = grid(200)
    published = KMeans(n_clusters=10, random_state=0, n_init="auto").fit_predict(coords)
    assert (group_coords(coords, "location", 10) == published).all()


ROW = st.tuples(*[st.sampled_from([-7, 0, 6e-8, 1e-3, 1e3, 6e4])] * 2)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@settings(deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=12), n_groups=st.integers(1, 20))
@example(rows=[(1e3, 1e-3), (1e-3, 6e4), (6e-8, -7), (1e3, 0), (0, 6e4), (1e-3, 0)], n_groups=6)
def test_any_features(rows: list[tuple[float, float]], n_groups: int) -> None:
    """Rows may be equal, or so near each other that k-means in float32 cannot tell them apart."""
    features = np.array(rows, np.float16)
    labels = group_features(features, n_groups)
    assert labels.shape == (len(features),)
    assert labels.dtype == np.int16
    assert set(labels) == set(range(labels.max() + 1))
    assert labels.max() < min(n_groups, len(np.unique(features, axis=0)))


def test_features_are_grouped_by_k_means_in_float32() -> None:
    features = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float16)
    published = KMeans(n_clusters=10, random_state=0, n_init="auto").fit_predict(features.astype(np.float32))
    assert (group_features(features, 10) == published).all()


@pytest.mark.parametrize("method", ["random", "sequential"])
def test_nearly_equal_parts(method: str) -> None:
    labels = group_coords(grid(23), method, 5)
    assert sorted(np.bincount(labels)) == [4, 4, 5, 5, 5]
    assert (np.diff(labels) >= 0).all() == (method == "sequential")


def test_random_follows_the_seed() -> None:
    first, again, other = (group_coords(grid(50), "random", 5, seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_cohort_file(tmp_path: Path) -> None:
    files = {}
    for slide, N in {"b": 30, "empty": 0, "a": 3}.items():
        files[slide] = tmp_path / f"{slide}.npy"
        np.save(files[slide], grid(N))
    group_cohort(files, "location-4", tmp_path / "groups" / "location-4.npz")
    group_cohort(files, "location-4", tmp_path / "again.npz")
    groups = read_groups(tmp_path / "groups" / "location-4.npz")
    assert list(groups) == ["b", "a"]  # slides without patches are left out
    for slide, (coords, labels) in groups.items():
        assert (coords == np.load(files[slide])).all()
        assert (labels == group_coords(coords, "location", 4)).all()
        assert (coords.dtype, labels.dtype) == (np.int32, np.int16)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "groups" / "location-4.npz").read_bytes()


def test_cohort_file_by_features(tmp_path: Path) -> None:
    stores, features = {}, {}
    for slide, N in {"b": 30, "failed": 0, "a": 3}.items():
        stores[slide] = tmp_path / f"{slide}.zarr.zip"
        features[slide] = np.random.default_rng(N).normal(size=(N, 16)).astype(np.float16)
        write_store(stores[slide], grid(N), features[slide], attributes_of(slide, "c", "ab" * 32))
    output, again = tmp_path / "groups" / ENCODER / "features-4.npz", tmp_path / "again.npz"
    for file in (output, again):
        group_cohort_by_features(stores, ENCODER, 4, file)
    groups = read_groups(output)
    assert list(groups) == ["b", "a"]  # a failed slide has no patches
    for slide, (coords, labels) in groups.items():
        assert (coords == grid(len(coords))).all()
        assert (labels == group_features(features[slide], 4)).all()
    assert again.read_bytes() == output.read_bytes()
    with pytest.raises(StoreError, match=rf"b.zarr.zip: features are of encoder '{ENCODER}', asked for 'other'"):
        group_cohort_by_features(stores, "other", 4, again)


def test_cohort_without_patches(tmp_path: Path) -> None:
    group_cohort({}, "location-4", tmp_path / "none.npz")
    assert read_groups(tmp_path / "none.npz") == {}


def test_names() -> None:
    assert parse_grouping("location-10") == ("location", 10)
    with pytest.raises(ValueError, match="unknown grouping 'locaton-10': did you mean 'location'"):
        parse_grouping("locaton-10")
    with pytest.raises(ValueError, match="unknown grouping 'location'"):
        parse_grouping("location")
    for wrong in ("location-0", "location-ten", "location-"):
        with pytest.raises(ValueError, match="is not a number of groups"):
            parse_grouping(wrong)
