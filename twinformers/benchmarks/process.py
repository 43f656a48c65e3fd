"""The other end of a worker's pipes: start it, ask it, and say what became of it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from twinformers.errors import WorkerError


def interpreter(module: str, arguments: Any) -> tuple[list[str], dict[str, str]]:
    """The command and environment of a fresh interpreter that runs a module of ours."""
    # -P: the working folder may hold anything, a module called jax among it.
    command = [sys.executable, "-P", "-m", module, json.dumps(arguments)]
    return command, {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


#: Quiet, without a network, and without taking all of an accelerator's memory from the others.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}


class Worker:
    """One process for `framework` and the folder `source`; started when first asked, and again after its end.

    `about` is what it says of its device. `ask` raises WorkerError where the process ends, does not answer
    within the limit (it is ended then), or answers that it cannot.
    """

    def __init__(
        self,
        framework: str,
        source: str,
        dtype: str,
        device: str | None = None,
        environment: Mapping[str, str] | None = None,
        attention: str = "fused",
        quantize: str | None = None,
    ):
        self.framework = framework
        self.about: dict[str, Any] = {}
        self._arguments = [framework, source, dtype, device, attention, quantize]
        self._environment = dict(environment or {})
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> tuple[list[str], dict[str, str]]:
        return interpreter("twinformers.benchmarks.worker", self._arguments)

    def start(self, limit: float | None = None) -> None:
        command, environment = self.command
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self._child = subprocess.Popen(
            command,
            env={**QUIET, **environment, **self._environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # compilers that it starts end with it
        )
        try:
            self.about = self._answer(limit)
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, limit: float | None = None, **arguments: Any) -> Any:
        """The answer to one request, after `limit` seconds at the most."""
        if self._child is None:
            self.start(limit)
        assert self._child is not None and self._child.stdin is not None
        try:
            request = json.dumps({"method": method, "arguments": arguments})
            self._child.stdin.write(request.encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self._answer(limit)

    def forget(self) -> None:
        """Let it give up what the last case needed, if it runs."""
        if self._child is not None:
            with contextlib.suppress(WorkerError):  # whoever asks next learns of its end
                self.ask("release")

    def _answer(self, limit: float | None) -> Any:
        assert self._child is not None and self._child.stdout is not None
        try:
            ready, _, _ = select.select([self._child.stdout], [], [], limit)
            line = self._child.stdout.readline() if ready else None
        except BaseException:  # an interrupt: its answer would be taken for that to the next request
            self.close()
            raise
        if line is None:
            self.close()
            raise WorkerError(f"no answer within {limit:g} s", where=self.framework)
        if not line:
            raise self._ended()
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"], where=self.framework)
        return reply["value"]

    def _ended(self) -> WorkerError:
        """What a process left behind that ended unasked."""
        assert self._child is not None
        code = self._child.wait()
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        self.close()
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return WorkerError(
            f"the process ended {how}",
            where=self.framework,
            found=last[0] if last else "",
            hint="memory may have run out: take a smaller batch, length or model" if code == -9 else "",
        )

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._child is None:
            return
        child, self._child = self._child, None
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        self._said.close()


def first_token(worker: Worker, limit: float | None) -> dict[str, Any]:
    """Seconds from nothing to the first token of a new process, which then ends."""
    started = time.perf_counter()
    try:
        found = worker.ask("first_token", limit)
        return {**found, "seconds": time.perf_counter() - started}
    finally:
        worker.close()
