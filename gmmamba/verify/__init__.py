"""Replays reference cases: numbers that the published implementations produced, against what ours compute.

Reads any folder that holds (at any depth) one or more of these, of whatever seeds, shapes and sizes:

    manifest.json   GMMamba cases `<id>_inputs.npz`, `<id>_outputs.npz` (float64), or single BiMambas `<id>.npz`
    index.json      cases of one baseline, `<case>.npz` (float32); weights and bags follow from rules

Writes one line a case to standard output. The rules and tolerances are those of the reference's own documents:
forward, gradients and gradient norms, in float32 and float64 where the reference allows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from gmmamba.verify.attention_models import (
    replay_abmil,
    replay_acmil,
    replay_clam,
    replay_dsmil,
    replay_dtfd,
    replay_ibmil,
    replay_ilra,
)
from gmmamba.verify.baselines import BaselineCase
from gmmamba.verify.checks import Check, Checks
from gmmamba.verify.gmmamba import replay_bimamba, replay_gmmamba

ADAPTERS: dict[str, Callable[[BaselineCase], Checks | None]] = {
    "abmil": replay_abmil,
    "clam": replay_clam,
    "dsmil": replay_dsmil,
    "dtfd": replay_dtfd,
    "ibmil": replay_ibmil,
    "ilra": replay_ilra,
    "acmil": replay_acmil,
}
"""How the cases of each method are replayed; None for a flavour that is not built."""


def verify(folder: Path, scan: str = "auto", device: str = "cpu") -> bool:
    """Replay every case below `folder` and print one line each; False if any quantity is out of tolerance.

    Methods that are not built are listed as "not implemented" and do not fail. FileNotFoundError for a folder
    without cases. `scan` is the backend of the selective scan; `device` is where GMMamba runs, baselines are replayed
    on the CPU.
    """
    manifests, indices = (sorted(Path(folder).rglob(name)) for name in ("manifest.json", "index.json"))
    if not manifests and not indices:
        raise FileNotFoundError(f"{folder} holds no reference cases: no manifest.json and no index.json, at any depth")
    passed = []
    for manifest in manifests:
        print(f"{manifest.parent}: largest relative error, float32/float64")
        for name, case in json.loads(manifest.read_text()).items():
            if not isinstance(case, dict) or not {"d_model", "mask_ratio"} & set(case):
                raise ValueError(f"{manifest} is no manifest of reference cases: {name!r} has no d_model or mask_ratio")
            replay = replay_bimamba if "d_model" in case else replay_gmmamba
            passed.append(report(name, replay(manifest.parent, name, case, scan, device)))
    for index in indices:
        content = json.loads(index.read_text())
        method, cases = content["method"], content["cases"]
        if method not in ADAPTERS:
            print(f"{index.parent}: {method}, {len(cases)} cases: not implemented")
            continue
        print(f"{index.parent}: {method}, relative error of float32 (absolute of float64 logits)")
        for spec in cases:
            checks = ADAPTERS[method](BaselineCase.read(index.parent, spec, content["parameters"]))
            if checks is None:
                print(f"  {Path(spec['file']).stem}: not implemented")
            else:
                passed.append(report(Path(spec["file"]).stem, checks))
    print(f"{sum(passed)} of {len(passed)} cases within tolerance")
    return all(passed)


def report(name: str, checks: Checks) -> bool:
    """Print the worst check of each quantity and precision on one line; out of tolerance is marked by '!'."""
    worst: dict[str, dict[str, Check]] = {}
    for check in checks:
        seen = worst.setdefault(check.quantity, {}).setdefault(check.precision, check)
        if check.error / (check.tolerance or 1) > seen.error / (seen.tolerance or 1):
            worst[check.quantity][check.precision] = check
    passed = all(check.passed for by_precision in worst.values() for check in by_precision.values())
    errors = (f"{quantity} " + "/".join(map(str, by_precision.values())) for quantity, by_precision in worst.items())
    print(f"  {name}: {'ok ' if passed else 'OUT OF TOLERANCE '} " + ", ".join(errors))
    return passed
