"""Programs that are not ours, timed as whole processes, with what their start takes subtracted."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from alembert.benchmarks.engines import Label, Text
from alembert.common.errors import InputError

# A small process starts the command: Linux counts the starter's own peak as the new program's, and the starter
# here would be the one that has loaded torch.
_LAUNCHER = """
import json, os, sys, time
arguments = json.loads(sys.argv[1])
started = time.perf_counter()
actions = [(os.POSIX_SPAWN_DUP2, 2, 1)]
pid = os.posix_spawnp(arguments[0], arguments, os.environ, file_actions=actions)
_, status, usage = os.wait4(pid, 0)
taken = time.perf_counter() - started
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([os.waitstatus_to_exitcode(status), taken, usage.ru_maxrss * unit / 1e6]))
"""


class ProcessRun(NamedTuple):
    """A program's run: wall-clock seconds of the whole process and its peak resident memory in MB."""

    seconds: float
    peak_memory_mb: float


@dataclass(frozen=True)
class OutsideProgram:
    """A command that reads texts, one per line, from {input} and writes their labels, one per line, to {output}.

    No shell reads the command: for pipes and the like write `sh -c '…'`.
    """

    name: str
    command: str

    @classmethod
    def parse(cls, given: str) -> OutsideProgram:
        """`NAME=command` as given on the command line.

        Raises InputError when a part is missing.
        """
        name, equals, command = given.partition("=")
        if not (name.strip() and equals and command.strip()):
            raise InputError(f"--against {given!r}: must be NAME=command")
        for placeholder in ("{input}", "{output}"):
            if placeholder not in command:
                raise InputError(
                    f"--against {name}: the command lacks {placeholder}; it must read texts, one per line, from "
                    "{input} and write their labels, one per line, to {output}"
                )
        try:
            shlex.split(command)
        except ValueError as error:
            raise InputError(f"--against {name}: the command is no shell line ({error})") from error
        return cls(name.strip(), command.strip())

    def label(self, texts: Sequence[Text]) -> tuple[list[str], ProcessRun]:
        """The program's labels as it wrote them, and what the run took.

        Raises InputError when the program cannot be started, fails, or writes another number of labels.
        """
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "texts.txt", Path(folder) / "labels.txt"
            lines = [_as_line(text) for text in texts]
            source.write_text("\n".join(lines) + "\n", encoding="utf-8")
            run = self._run(source, target)
            if not target.is_file():
                raise InputError(f"--against {self.name}: the command wrote nothing to {{output}}")
            labels = target.read_text(encoding="utf-8").splitlines()
        if len(labels) != len(texts):
            raise InputError(
                f"--against {self.name}: {len(labels)} labels for {len(texts)} texts; write one label per line"
            )
        return [label.strip() for label in labels], run

    def _run(self, source: Path, target: Path) -> ProcessRun:
        arguments = [
            word.replace("{input}", str(source)).replace("{output}", str(target))
            for word in shlex.split(self.command)
        ]
        launched = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, json.dumps(arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        if launched.returncode:
            raise InputError(f"--against {self.name}: {arguments[0]} cannot be started")
        code, taken, memory = json.loads(launched.stdout)
        if code:
            said = launched.stderr.strip().splitlines()
            raise InputError(
                f"--against {self.name}: the command ended with code {code}{': ' + said[-1] if said else ''}"
            )
        return ProcessRun(taken, memory)


def read_labels(
    lines: Sequence[str], problem_type: str, label_names: Sequence[str], where: str
) -> list[Label]:
    """Labels as written by a program: a name, a number for regression, names separated by "|" for multi-label.

    Raises InputError naming the first line that is none.
    """
    labels: list[Label] = []
    for row, line in enumerate(lines, 1):
        if problem_type == "regression":
            labels.append(_number(line, row, where))
            continue
        names = [name for name in line.split("|") if name] if problem_type.startswith("multi") else [line]
        unknown = [name for name in names if name not in label_names]
        if unknown:
            raise InputError(f"{where}: line {row}: {unknown[0]!r} is no label of the data")
        labels.append(names if problem_type.startswith("multi") else line)
    return labels


def _number(line: str, row: int, where: str) -> float:
    try:
        return float(line)
    except ValueError as error:
        raise InputError(f"{where}: line {row}: {line!r} is no number") from error


def _as_line(text: Any) -> str:
    """A text in one line; the two texts of a pair are separated by a tab."""
    fields = text if isinstance(text, tuple) else (text,)
    return "\t".join(" ".join(field.split()) for field in fields)
