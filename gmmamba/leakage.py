"""Ways in which a test slide is known from training although no patient_id is in two parts.

- one file under two slide_ids, also by links (`same_files`, before any job);
- two files with the same content: the same features at the same places, or OpenSlide's quickhash of the file, whatever
  name, format or cohort they have (`check_content`, when a dataset is split, where the stores are);
- patients that differ by the name of a class alone, such as case12-tumour and case12-normal: these may be one person,
  or two with a count for each class (`named_by_class`, before any job).

The first two are refused where the patients differ. Within one patient, who is in one part, the slide counts twice: a
warning, as for the third, which ids cannot decide. A class in the path or the slide_id is none of them: models see
features, not names.
"""

from __future__ import annotations

import hashlib
import logging
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gmmamba.slide_tables import read_slide_tables
from gmmamba.split_files import SHOWN, SplitError
from slidestore import open_store

log = logging.getLogger(__name__)

SHORTEST_NAME = 3  # letters: a class called "a" or "1" is in many an id by chance
ONCE = "fill 'exclude' for all but one, unless that is meant"


class LeakageError(SplitError):
    """Slides of a dataset that would be known from training; the message names each, and the remedy."""


def same_files(slides: Iterable[tuple[str, str, Path]]) -> tuple[list[str], list[str]]:
    """Sentences that name the slides which are one file: problems, where the patients differ, and warnings.

    slides: the patient, what a slide is called in messages, and its file; excluded slides are not among them.
    """
    found: dict[object, list[tuple[str, str]]] = defaultdict(list)
    named: dict[object, Path] = {}
    for patient, place, path in slides:
        try:
            status = path.stat()
            key: object = (status.st_dev, status.st_ino)
        except OSError:  # imported features need no slide
            key = str(path)
        found[key].append((patient, place))
        named[key] = path
    problems, warnings = [], []
    for key, members in found.items():
        listed = f"{'; '.join(place for _, place in members)} are one file, {named[key]}"
        if len({patient for patient, _ in members}) > 1:
            problems.append(f"{listed}: fill 'exclude' for all but one")
        elif len(members) > 1:
            warnings.append(f"{listed}, of one patient, which counts {len(members)} times: {ONCE}")
    return problems, warnings


def named_by_class(patients: Mapping[str, str], classes: Sequence[str]) -> list[str]:
    """A sentence that names patients which differ by a class's name alone, if there are any; patients: id -> the first
    slide and its place.

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
    groups = [
        " and ".join(f"{patient} ({patients[patient]})" for patient in members)
        for rest, members in found.items()
        if len(members) > 1 and re.search("[a-z]", rest) and any(map(token.search, members))
    ]
    if not groups:
        return []
    more = f"; … and {len(groups) - SHOWN} more" if len(groups) > SHOWN else ""
    return [
        f"patients differ by the name of a class alone: {'; '.join(groups[:SHOWN])}{more}. If these are the same "
        f"people, they may be trained on and tested: give one person one patient_id (one patient needs one label)"
    ]


def check_content(slide_tables: Mapping[str, Path]) -> None:
    """Raise LeakageError where two ready slides of these cohorts (cohort -> slide table) have the same content and
    different patients; a warning is logged where the patient is the same."""
    slides = read_slide_tables(slide_tables)
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in slides[slides["status"] == "ready"].to_dict("records"):
        name = f"{row['slide_id']} (cohort {row['cohort']}, patient {row['patient_id']}, {row['label']})"
        for digest in content_digests(Path(row["store"])):
            found[digest].append((row["patient_id"], name))
    doubles: set[str] = set()
    repeated: set[str] = set()
    for members in found.values():
        if len(members) > 1:
            refused = len({patient for patient, _ in members}) > 1
            (doubles if refused else repeated).add("; ".join(name for _, name in members))
    if doubles:
        listed = "\n".join(f"  - {names}" for names in sorted(doubles))
        raise LeakageError(
            f"these slides have the same content, and would be trained on and tested:\n{listed}\n"
            f"Fill 'exclude' in the sheet for all but one of each line, and find out whose it is"
        )
    for names in sorted(repeated):
        log.warning("%s have the same content, which counts several times: %s", names, ONCE)


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
