"""Ways in which a test slide is known from training although no patient_id is in two parts: each is refused.

- one file under two slide_ids, also by links (`same_files`, before any job);
- patients that differ by the name of a class alone, such as case12-tumour and case12-normal: ids made of file names
  that carry the label, under which one person is two (`named_by_class`, before any job);
- two files with the same content: the same features at the same places, or OpenSlide's quickhash of the file, whatever
  name, format or cohort they have (`check_content`, when a dataset is split, where the stores are).

A class in the path or the slide_id is none of them: models see features, not names.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gmmamba.slide_tables import read_slide_tables
from gmmamba.split_files import SplitError
from slidestore import open_store

SHORTEST_NAME = 3  # letters: a class called "a" or "1" is in many an id by chance


class LeakageError(SplitError):
    """Slides of a dataset that would be known from training; the message names each, and the remedy."""


def same_files(paths: Iterable[tuple[str, Path]]) -> Iterator[str]:
    """Sentences that name the slides which are one file; paths: what a slide is called in messages, and its file."""
    found: dict[object, list[str]] = defaultdict(list)
    named: dict[object, Path] = {}
    for place, path in paths:
        try:
            status = path.stat()
            key: object = (status.st_dev, status.st_ino)
        except OSError:  # imported features need no slide
            key = str(path)
        found[key].append(place)
        named[key] = path
    for key, places in found.items():
        if len(places) > 1:
            yield f"{'; '.join(places)} are one file, {named[key]}: fill 'exclude' for all but one"


def named_by_class(patients: Mapping[str, str], classes: Sequence[str]) -> Iterator[str]:
    """Sentences that name patients which differ by a class's name alone; patients: id -> the first slide and its place.

    A mere number beside the class, as in normal_001 and tumor_001, says nothing: each class may have its own count.
    """
    words = [name for name in classes if len(re.findall("[a-z]", name, re.IGNORECASE)) >= SHORTEST_NAME]
    # The longest first: of "low-grade" and "low", the former.
    names = "|".join(re.escape(name) for name in sorted(words, key=len, reverse=True)) or "(?!)"
    token = re.compile(rf"(?<![a-z0-9])(?:{names})(?![a-z])", re.IGNORECASE)
    found: dict[str, list[str]] = defaultdict(list)
    for patient in patients:
        rest = re.sub(r"[^a-z0-9]+", "-", token.sub(" ", patient).lower()).strip("-")
        found[rest].append(patient)
    for rest, members in found.items():
        if len(members) > 1 and re.search("[a-z]", rest) and any(map(token.search, members)):
            listed = "; ".join(f"{patient} ({patients[patient]})" for patient in members)
            yield (
                f"the patients {listed} differ by the name of a class alone: give one person one patient_id, and "
                f"different people ids without classes"
            )


def check_content(slide_tables: Mapping[str, Path]) -> None:
    """Raise LeakageError where two ready slides of these cohorts (cohort -> slide table) have the same content."""
    slides = read_slide_tables(slide_tables)
    found: dict[str, list[str]] = defaultdict(list)
    for row in slides[slides["status"] == "ready"].to_dict("records"):
        name = f"{row['slide_id']} (cohort {row['cohort']}, patient {row['patient_id']}, {row['label']})"
        for digest in content_digests(Path(row["store"])):
            found[digest].append(name)
    doubles = {"; ".join(names) for names in found.values() if len(names) > 1}
    if doubles:
        listed = "\n".join(f"  - {names}" for names in sorted(doubles))
        raise LeakageError(
            f"these slides have the same content, and would be trained on and tested:\n{listed}\n"
            f"Fill 'exclude' in the sheet for all but one of each line; if the patients differ, find out whose it is"
        )


def content_digests(store: Path) -> list[str]:
    """What tells the content of a slide, but not its name: the coordinates and features of its store, from the
    checksums that the archive keeps, and, where OpenSlide read it, the quickhash of its file."""
    with zipfile.ZipFile(store) as archive:
        chunks = [(e.filename, e.CRC, e.file_size) for e in archive.infolist() if not e.filename.endswith("zarr.json")]
    quickhash = open_store(store).attributes.source.get("quickhash")
    return [
        hashlib.sha256(repr(sorted(chunks)).encode()).hexdigest(),
        *([f"quickhash {quickhash}"] if quickhash else []),
    ]
