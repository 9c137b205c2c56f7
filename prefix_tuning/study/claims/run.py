"""The command: one claim after the other, each written as soon as it is done."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefix_tuning.errors import UserError
from prefix_tuning.files.writing import write_json
from prefix_tuning.study.claims.cartridges import exchange, fixed_keys
from prefix_tuning.study.claims.he import gated
from prefix_tuning.study.claims.lab import Lab, two_processes
from prefix_tuning.study.claims.le import shared
from prefix_tuning.study.claims.li_liang import infix, length, projection
from prefix_tuning.study.claims.li_liang_data import extrapolation, low_data, words
from prefix_tuning.study.claims.petrov import identity, unlock
from prefix_tuning.study.claims.record import Finding
from prefix_tuning.study.claims.report import write_claims
from prefix_tuning.study.claims.settings import FULL, QUICK, ClaimsConfig, Scale

Experiment = Callable[[Lab], Finding]

# In the order of the page, by their names in the JSON.
CLAIMS: dict[str, Experiment] = {
    "length": length,
    "infix": infix,
    "low_data": low_data,
    "words": words,
    "projection": projection,
    "extrapolation": extrapolation,
    "shared": shared,
    "identity": identity,
    "unlock": unlock,
    "gated": gated,
    "exchange": exchange,
    "fixed_keys": fixed_keys,
}


def try_claims(config: ClaimsConfig) -> None:
    """The command. Raises UserError if the output cannot be written, or if its .json is no such record."""
    scale = QUICK if config.quick else FULL
    if config.quick:
        print("quick: one seed, fewer steps and points; the full run's figures may differ")
    with two_processes() as imap:
        run_claims(Lab(scale, imap), CLAIMS, Path(config.output), config.quick)


def run_claims(lab: Lab, claims: dict[str, Experiment], page: Path, quick: bool) -> None:
    """Runs those of the claims that the record beside `page` does not hold yet. Prints a line for each, and writes record
    and page after each.
    """
    record_file, scale = page.with_suffix(".json"), scale_record(lab.scale)
    findings = taken_over(record_file, scale, claims)
    for number, (name, claim) in enumerate(claims.items(), start=1):
        if name in findings:
            tqdm.write(f"{findings[name].line()} (taken over from {record_file})")
        else:
            begun = time.perf_counter()
            lab.title = f"{number}/{len(claims)} {name}"
            finding = findings[name] = claim(lab)
            finding.seconds = round(time.perf_counter() - begun, 1)
            tqdm.write(f"{finding.line()} [{finding.seconds:.0f} s]")
        ordered = {key: findings[key] for key in claims if key in findings}
        records = {key: found.to_json() for key, found in ordered.items()}
        write_json(record_file, {"quick": quick, "scale": scale, "claims": records})
        write_claims(page, list(ordered.values()), quick)
    tqdm.write(f"{page} and {record_file}: {len(findings)} claims")


def scale_record(scale: Scale) -> dict[str, Any]:
    """The scale as it comes back from JSON."""
    return json.loads(json.dumps(vars(scale)))


def taken_over(record_file: Path, scale: dict[str, Any], claims: dict[str, Experiment]) -> dict[str, Finding]:
    """The findings of an earlier start at the same scale; none, if there was no such start. Raises UserError if the file
    holds something else.
    """
    if not record_file.exists():
        return {}
    try:
        record = json.loads(record_file.read_text("utf-8"))
        found = {name: Finding.from_json(content) for name, content in record["claims"].items() if name in claims}
        return found if record["scale"] == scale else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{record_file}: is no record of this command: {error!r}; delete it, or name another --output"
        ) from error
