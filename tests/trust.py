"""docs/trust.md: what is promised, how each promise is tested, and the counts of the last run of each harness.

    python tests/trust.py

Reads docs/trust/NAME.json as the harnesses write them (`make trust` runs them first), and notes in each new one when and with
what it was made. A harness that was not run is said to be so.
"""

from __future__ import annotations

import json
import platform
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE, COUNTS = ROOT / "docs" / "trust.md", ROOT / "docs" / "trust"
LIBRARIES = ("torch", "numpy", "nibabel", "pydicom")
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Harness:
    """name: of tests/NAME.py and of its counts. promise, tested: sentences. said: the counts in words."""

    name: str
    title: str
    promise: str
    tested: str
    said: Callable[[Line], str]

    @property
    def there(self) -> bool:
        return (ROOT / "tests" / f"{self.name}.py").is_file()


def _of(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


HARNESSES = (
    Harness("chaos", "Kill it anywhere",
            "A training that is killed, stopped, starved of disk or of data, or robbed of a loading process resumes and "
            "ends with the weights of the undisturbed one, bit for bit on a CPU. Checkpoints on disk can be read at every "
            "moment. Requests to stop save first. A step whose loss or gradient is not finite is skipped and counted; after "
            "ten in a row the run takes up its last checkpoint and goes on with the data that come next, three times at most. "
            "The last `train.keep` checkpoints stay, and that with the lowest loss, `checkpoints/best`.",
            "`make chaos KILLS=100` disturbs trainings of each modality at random moments, also inside the writing of "
            "checkpoints, resumes them and compares all weights.",
            lambda x: f"{x['chaos']:,} disturbances of {x['trials']:,} trainings, {x['lost']:,} lost ({_of(x['faults'])})"),
    Harness("fuzz", "Hostile and broken files",
            "No file makes a reader crash, hang, take memory without bound or run code. What cannot be read is refused in "
            "words, quarantined and counted, and the rest trains.",
            "`make fuzz SECONDS=600` gives every reader mutated, cut, exaggerated and malicious files, guided by coverage "
            "where atheris is installed.",
            lambda x: f"{x['fuzz']:,} inputs to {len(x['targets']):,} readers, {x['findings']:,} findings"),
    Harness("round_trips", "Geometry",
            "A label that is pushed through the pipeline and back is voxel-identical, or the file is refused with the "
            "reason.",
            "`python tests/round_trips.py` goes through orientations, spacings, oblique affines and gantry tilts.",
            lambda x: _of({k: v for k, v in x.items() if isinstance(v, int) and k != "seconds"})),
    Harness("canaries", "Identity",
            "No name, id, date, UID or path of a patient or of the machine is in any artefact, log, message or progress "
            "line: cases have keyed pseudonyms, whose key lies outside all runs. Of DICOM only listed elements are "
            "parsed. What a library says in an error is not repeated.",
            "`make canaries` plants invented words in headers, texts, tables, file and folder names and the home "
            "directory, runs every command, breaks some by errors whose messages name everybody, unpacks all that came "
            "out and searches it. The same search has to find every word in the data.",
            lambda x: f"{x['canaries']:,} words planted in {len(x['modalities']):,} data sets, {x['commands']:,} commands, "
                      f"{x['artefacts']:,} artefacts in {x['pieces']:,} pieces and {x['printed_bytes']:,} printed bytes "
                      f"searched: {x['found']:,} found"),
    Harness("golden", "Determinism and drift",
            "The same seed gives the same weights on a CPU, bit for bit, in any process and with any number of loading "
            "processes. Numbers do not change unnoticed.",
            "`tests/test_golden.py` compares digests of weights with 0, 1 and 2 loading processes and in another "
            "interpreter; `make golden` compares losses, norms and embeddings of tiny trainings with those stored in "
            "`tests/golden`, and `make golden ARGS=--renew` stores new ones.",
            lambda x: f"{x['golden']:,} modalities, {x['steps']:,} steps each, {x['moved']:,} moved by more than "
                      f"{x['tolerance']:g} relative"),
)

REST = """\
## Supply

`requirements/locked.txt` names every dependency by version and by the hashes of its files, for all platforms and for Python
3.11 and later; `make test` and `make demo` install nothing else. `make HASHES=no test` installs the same versions unchecked,
where a platform has to build some of them itself. `make lock` renews the file from `constraints.txt`; `make audit` asks a
public database for known vulnerabilities of what it names. `make wheels` gathers a folder of wheels and `make offline`,
without a network, an environment from it. `tests/test_supply.py` builds the sdist, from it the wheel, compares the wheel with
the source tree file by file, and installs and runs it without an index.

The suite runs on Python 3.11 with torch 2.15. The golden trainings gave the same numbers, within their tolerance, on Python
3.13 with everything from the lock, and on Python 3.12 with torch 2.11, the oldest that is supported. Other pairs are not
tested.

## Limits

- A message repeats the arguments of its own command as they were typed: a path in `--data` or `--out` stands in its errors,
  and a message about a list or an annotation file names that file.
- Predictions go by the names of their source files, and of graphs by the names of their nodes: that is what they are for. A
  DICOM SEG refers to its source, and is as identified as that.
- `data check --names` shows true names, on the terminal only. `MERISTEM_TRACEBACK=1` shows messages of libraries, which may.
- In Python, exceptions are passed on as they are: only the command line withholds what libraries say in them.
- Names of classes are shown, by which reports would be nothing. A folder of a class that is called by a patient is one.
- Text that is burnt into pixels is looked for by `data check`, but nothing removes it; pictures in reports show it.
- Faces are removed by nobody here. Voxels that a defacing tool has set to one value are left out of the loss by
  `modality.volume.excluded=0`.
- Whoever has the key of the pseudonyms and a list of names can tell whose a pseudonym is. Weights may remember what they saw.
- Bits are promised on one machine's CPU. Other processors, other versions of torch and GPUs round otherwise.
"""


def stamped(file: Path) -> dict[str, Any]:
    """A harness's counts, with the day and the versions they were made with, noted now where they are not."""
    line: dict[str, Any] = json.loads(file.read_text())
    if "when" not in line:
        line |= {"when": time.strftime("%Y-%m-%d"),
                 "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}}
        file.write_text(json.dumps(line, indent=1) + "\n")
    return line


def page(lines: Mapping[str, Line]) -> str:
    """The text of docs/trust.md. lines: harness -> its counts, of those that were run."""
    parts = ["<!-- Written by tests/trust.py from docs/trust/*.json; `make trust` renews both. -->", "# Trust",
             "What is promised, how each promise is tested, and the counts of the last run."]
    for harness in (h for h in HARNESSES if h.there):
        line = lines.get(harness.name)
        told = "Not run yet." if line is None else (
            f"Last run, {line['when']} (" + ", ".join(f"{k} {v}" for k, v in line["versions"].items()) + f"): "
            f"{harness.said(line)}.")
        parts.append(f"## {harness.title}")
        parts += [textwrap.fill(x, 128, break_on_hyphens=False) for x in (harness.promise, harness.tested, told)]
    return "\n\n".join([*parts, REST])


def main() -> None:
    PAGE.write_text(page({h.name: stamped(file) for h in HARNESSES if (file := COUNTS / f"{h.name}.json").is_file()}))


if __name__ == "__main__":
    main()
