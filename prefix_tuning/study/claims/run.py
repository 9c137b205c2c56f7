"""The command: it tries one claim after the other and writes each as soon as it is done."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefix_tuning.errors import UserError
from prefix_tuning.files.writing import write_json
from prefix_tuning.study.claims import exchange, experiments, identities, reading
from prefix_tuning.study.claims.lab import Lab, two_processes
from prefix_tuning.study.claims.record import Finding
from prefix_tuning.study.claims.report import write_claims
from prefix_tuning.study.claims.settings import FULL, QUICK, ClaimsConfig

Experiment = Callable[[Lab], Finding]

# In the order of the page, by their names in the JSON.
CLAIMS: dict[str, Experiment] = {
    "length": experiments.length,
    "infix": experiments.infix,
    "low_data": experiments.low_data,
    "words": experiments.words,
    "projection": experiments.projection,
    "extrapolation": experiments.extrapolation,
    "shared": experiments.shared,
    "identity": identities.scaled,
    "unlock": experiments.unlock,
    "gated": identities.gated,
    "exchange": exchange.exchange,
    "fixed_keys": experiments.fixed_keys,
    "objective": reading.objective,
    "text_start": reading.text_start,
    "size": reading.size,
    "composed": reading.composed,
    "shorter": reading.shorter,
}


def try_claims(config: ClaimsConfig) -> None:
    """The command. Raises UserError if the output cannot be written, or if its .json is no record of this command."""
    if config.quick:
        print("quick: one seed, fewer steps and points; the full run's figures may differ")
    with two_processes() as imap:
        run_claims(Lab(QUICK if config.quick else FULL, imap), CLAIMS, Path(config.output), config.quick)


def run_claims(lab: Lab, claims: dict[str, Experiment], page: Path, quick: bool) -> None:
    """Runs the claims and prints a line for each. What the record beside `page` holds already is not run again.

    The record is written after each training, the page after each claim.
    """
    record_file, scale = page.with_suffix(".json"), json.loads(json.dumps(vars(lab.scale)))
    lab.results = results_in(record_file, scale)
    findings: dict[str, Finding] = {}

    def keep() -> None:
        found = {name: finding.to_json() for name, finding in findings.items()}
        write_json(record_file, {"quick": quick, "scale": scale, "results": lab.results, "claims": found})

    lab.keep = keep
    for number, (name, claim) in enumerate(claims.items(), start=1):
        begun = time.perf_counter()
        lab.title = f"{number}/{len(claims)} {name}"
        findings[name] = claim(lab)
        tqdm.write(f"{findings[name].line()} [{time.perf_counter() - begun:.0f} s]")
        keep()
        write_claims(page, list(findings.values()), quick)
    tqdm.write(f"{page} and {record_file}: {len(findings)} claims")


def results_in(record_file: Path, scale: dict[str, Any]) -> dict[str, Any]:
    """What an earlier start has measured; nothing, if there was none. Raises UserError if the file holds something else, or
    was written at another scale: with --quick, for example.
    """
    if not record_file.exists():
        return {}
    try:
        record = json.loads(record_file.read_text("utf-8"))
        if record["scale"] != scale:
            raise UserError(f"{record_file}: was measured with other settings; delete it, or name another --output")
        return dict(record["results"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{record_file}: is no record of this command: {error!r}; delete it, or name another --output"
        ) from error
