"""Groups of patches, made once per slide and stored (Zheng et al., ICCV 2025).

Reads the coordinates of each slide's patches, ``results/{cohort}/tiles/{slide}.npy``; writes the cohort's groups,
``results/{cohort}/groups/{grouping}.npz`` (see slidestore.groups). These hold for every encoder. Groups by features
hold for one: they are read from its stores and written to ``results/{cohort}/groups/{encoder}/features-10.npz``.

A grouping is named by method and number of groups: "location-10". Slides without patches have no rows and are
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from slidestore import open_store
from slidestore.groups import write_groups
from slidestore.settings import nearest

Coords = NDArray[np.integer]


def parse_grouping(grouping: str) -> tuple[str, int]:
    """("location", 10) of "location-10"; ValueError for an unknown method or a number of groups below 1."""
    method, _, number = grouping.rpartition("-")
    if method not in METHODS:
        hint, known = nearest(method or grouping, METHODS, otherwise=""), ", ".join(f"{m}-<groups>" for m in METHODS)
        raise ValueError(f"unknown grouping {grouping!r}: {hint and f'{hint} '}Known: {known}")
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"grouping {grouping!r}: {number!r} is not a number of groups, e.g. '{method}-10'")
    return method, int(number)


def group_coords(coords: Coords, method: str, n_groups: int, seed: int = 0) -> NDArray[np.int16]:
    """Label (N,) of each patch at `coords` (N, 2), level-0 pixels, N >= 1; at most N groups."""
    return METHODS[method](coords, min(n_groups, len(coords)), seed).astype(np.int16)


def k_means(points: NDArray[Any], n_groups: int, seed: int) -> NDArray[np.integer]:
    """k-means on the raw rows (N, K), as published; at most as many groups as there are different rows."""
    different = len(np.unique(points, axis=0))
    # One thread: on a regular grid equal distances are common, and the order of sums must not decide them.
    with threadpool_limits(limits=1):
        labels = KMeans(min(n_groups, different), random_state=seed, n_init="auto").fit_predict(points)
    return np.unique(labels, return_inverse=True)[1]  # rows that differ by less than rounding leave a label unused


def at_random(coords: Coords, n_groups: int, seed: int) -> NDArray[np.integer]:
    """A permutation split into nearly equal parts."""
    labels = np.empty(len(coords), dtype=np.int64)
    labels[np.random.default_rng(seed).permutation(len(coords))] = in_sequence(coords, n_groups, seed)
    return labels


def in_sequence(coords: Coords, n_groups: int, seed: int) -> NDArray[np.integer]:
    """The order of the patches split into nearly equal parts."""
    parts = np.array_split(np.arange(len(coords)), n_groups)
    return np.repeat(np.arange(n_groups), [len(part) for part in parts])


METHODS: dict[str, Callable[[Coords, int, int], NDArray[np.integer]]] = {
    "location": k_means,
    "random": at_random,
    "sequential": in_sequence,
}


def group_cohort(coords_files: Mapping[str, Path], grouping: str, output: Path) -> None:
    """Group every slide of a cohort; `coords_files` maps slide ids to the tiles' .npy."""
    method, n_groups = parse_grouping(grouping)
    coords = {slide: np.load(path) for slide, path in coords_files.items()}
    groups = {slide: (xy, group_coords(xy, method, n_groups)) for slide, xy in coords.items() if len(xy)}
    write_groups(output, groups)


def group_features(features: NDArray[np.floating], n_groups: int) -> NDArray[np.int16]:
    """Label (N,) of each patch with `features` (N, D), N >= 1: k-means in float32."""
    return k_means(features.astype(np.float32), n_groups, seed=0).astype(np.int16)


def group_cohort_by_features(stores: Mapping[str, Path], encoder: str, n_groups: int, output: Path) -> None:
    """Group every slide of a cohort by its features; `stores` maps slide ids to the stores of `encoder`."""
    groups = {}
    for slide, path in stores.items():  # one after the other: the features of a cohort may not fit into memory
        store = open_store(path, encoder)
        if len(store.coords):
            groups[slide] = (store.coords, group_features(store.features, n_groups))
    write_groups(output, groups)
