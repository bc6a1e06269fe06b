"""An engine in a process of its own, so that its memory is its own and its threads disturb no other's.

    python -m alembert.benchmarks.worker '{"source": …}'

Requests and replies are lines of JSON on standard input and output. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, Protocol, Self

import numpy as np

from alembert.benchmarks.engines import Convention, EngineSettings, Text, load_engine, seconds
from alembert.common.errors import InputError


class Worker(Protocol):
    """Where an engine is asked from."""

    def ask(self, what: str, **how: Any) -> Any:
        """The engine's reply to a request; see `EngineRequests`."""

    def close(self) -> None:
        """Ends it."""


class EngineRequests:
    """What can be asked of an engine; every reply is a value that JSON can carry."""

    def __init__(self, settings: EngineSettings) -> None:
        started = time.perf_counter()
        self._engine = load_engine(settings)
        self._load_seconds = time.perf_counter() - started
        self._texts: list[Text] = []
        self._alone: list[Text] = []

    def ask(self, what: str, **how: Any) -> Any:
        """The reply to a request by its name."""
        return getattr(self, f"_{what}")(**how)

    def close(self) -> None:
        """Nothing to end."""

    def _facts(self) -> dict[str, Any]:
        engine = self._engine
        return {
            "policy": engine.policy,
            "max_length": engine.max_length,
            "speed": engine.speed,
            "exits": list(engine.exits),
            "load_seconds": self._load_seconds,
        }

    def _lengths(self, texts: Sequence[Any]) -> list[int]:
        return [int(length) for length in self._engine.lengths(_as_texts(texts))]

    def _answers(self, texts: Sequence[Any], speed: float) -> dict[str, Any]:
        given = _as_texts(texts)
        answers = self._engine.answer(given, speed)
        lengths = self._engine.lengths(given)

        def macs(convention: Convention) -> list[float] | None:
            counted = self._engine.macs(answers.exit_layers, lengths, speed, convention)
            return None if counted is None else np.asarray(counted, np.float64).tolist()

        return {
            "labels": answers.labels,
            "exit_layers": answers.exit_layers.tolist(),
            "lengths": lengths.tolist(),
            "macs": macs("paper"),
            "macs_executed": macs("full"),
        }

    def _hold(self, texts: Sequence[Any], alone: Sequence[Any]) -> None:
        """Keeps the texts to be timed: in batches, and one by one."""
        self._texts, self._alone = _as_texts(texts), _as_texts(alone)

    def _throughput(self, speed: float) -> float:
        """Seconds that all held texts take."""
        return seconds(lambda: self._engine.answer(self._texts, speed))

    def _latencies(self, speed: float) -> list[float]:
        """Seconds that each text held for it takes alone."""
        one: Callable[[Text, float], Any] = self._engine.answer_one
        clock, taken = time.perf_counter, []
        for text in self._alone:
            started = clock()
            one(text, speed)
            taken.append(clock() - started)
        return taken

    def _tokenisation(self) -> float:
        """Seconds that tokenising all held texts takes, the median of three."""
        return float(np.median([seconds(lambda: self._engine.lengths(self._texts)) for _ in range(3)]))

    def _peak_memory(self) -> float | None:
        return peak_memory_mb()


class ProcessWorker:
    """Asks an engine that runs in a process of its own.

    Raises InputError for what the engine refuses, RuntimeError when the process fails otherwise.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._source = settings.source
        self._messages = tempfile.TemporaryFile(mode="w+", encoding="utf-8")  # noqa: SIM115
        # The number of threads must be known before the libraries are loaded.
        threads = str(settings.threads)
        # Of matrix products, and of tokenizers.
        environment = os.environ | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        self._process = Popen(
            [sys.executable, "-m", "alembert.benchmarks.worker", json.dumps(asdict(settings))],
            stdin=PIPE,
            stdout=PIPE,
            stderr=self._messages,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        try:
            self._reply()
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **how: Any) -> Any:
        """Sends a request and waits for its reply."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"what": what, "how": how}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._failure() from error
        return self._reply()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        reply = json.loads(line)
        if "refused" in reply:
            raise InputError(reply["refused"])
        if "failed" in reply:
            raise RuntimeError(f"{self._source}: {reply['failed']}")
        return reply["value"]

    def _failure(self) -> RuntimeError:
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().strip().splitlines()
        return RuntimeError(
            f"{self._source}: its process ended with code {code}{': ' + lines[-1] if lines else ''}"
        )


def peak_memory_mb(status: Path = Path("/proc/self/status")) -> float | None:
    """The most memory that this process ever had resident, in MB (10⁶ bytes); None where the system cannot tell."""
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _as_texts(texts: Sequence[Any]) -> list[Text]:
    """Texts as JSON carried them, pairs as tuples again."""
    return [text if isinstance(text, str) else (str(text[0]), str(text[1])) for text in texts]


def _serve(settings: EngineSettings) -> None:
    # Standard output is for replies: whatever else is printed must not come between them.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: EngineRequests | None = None

    def attempt(call: Callable[[], Any]) -> None:
        try:
            reply = {"value": call()}
        except InputError as error:
            reply = {"refused": str(error)}
        except Exception as error:
            traceback.print_exc()
            reply = {"failed": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    def load() -> None:
        nonlocal requests
        requests = EngineRequests(settings)

    attempt(load)
    for line in sys.stdin:
        if requests is None:
            break
        request, loaded = json.loads(line), requests
        attempt(lambda: loaded.ask(request["what"], **request["how"]))  # noqa: B023


def _main() -> None:
    values = json.loads(sys.argv[1])
    if values["exits"] is not None:
        values["exits"] = tuple(values["exits"])
    settings = EngineSettings(**values)
    if settings.kind != "alembert":
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    _serve(settings)


if __name__ == "__main__":
    _main()
