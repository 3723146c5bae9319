"""TensorRT engines on the board, run by trtexec in processes of their own. Python >= 3.6, numpy on use.

Times are trtexec's: what a query takes on the device, with CUDA graph and without data transfers, not what a program of the
user's sees from outside. They are compared with those of another engine, round by round. Percentiles are of such times too: what
holds the device up is in them, what holds the host up is not.
"""

import atexit
import json
import os
import re
import shutil
import subprocess
import tempfile

import engines
import failures
import trtexec
import trtexec_replay

RUN_S = 300.0
LEAST_WARMUP_S, LEAST_S = 0.2, 0.2
SINGLE_WARMUP_S = 0.5
"""Before queries that are looked at one by one: a device whose clocks are still rising would be its own tail."""
REPLAY_MORE_S = 1.0
"""A replay goes on for so long after its window."""
PLAIN = re.compile(r"^[A-Za-z0-9_.-]+$")
RESULT = re.compile(r'"name"\s*:\s*"([^"]*)"\s*,\s*"dimensions"\s*:\s*"([^"]*)"\s*,\s*"values"\s*:\s*\[([^\]]*)\]')
TAG_10, TAG_11 = 100000, 110000


class TrtexecEngine(object):
    """One engine file.

    Args:
        source: Path or bytes of the engine.
    """

    def __init__(self, source):
        if isinstance(source, bytes):
            folder = tempfile.mkdtemp(prefix="edgeprune-")
            atexit.register(shutil.rmtree, folder, True)
            content, source = source, os.path.join(folder, "engine.plan")
            with open(source, "wb") as file:
                file.write(content)
        found = trtexec.find({}, None)
        self._program, self._tag = found["program"], int(found["version_tag"])
        self._source, self._arguments = source, trtexec.recalled(source)
        self.inputs, self.outputs = [], []

    def bind(self, arrays=None):
        """See that trtexec loads and runs it."""
        with Folder() as folder:
            self._run(["--iterations=1", "--warmUp=0", "--duration=0"], folder)

    def run(self, times):
        """Refused: with a process for every run nothing but its start would be timed."""
        raise failures.Failure(
            error="BackendUnavailableError",
            message="a TensorRT engine must run in the runner's own process for this, and edgeprune cannot do that yet.",
            hint="compile, deploy and profile work with TensorRT; measure endurance with your own program",
        )

    def empty(self):
        """None: device times hold no cost of a call."""
        return None

    def timed(self, warmup_s, sample_s, samples, layers=False):
        """Time it in one process of trtexec; what `bench.time_item` returns.

        Args:
            warmup_s: Warm up at least so long, seconds.
            sample_s: Least length of one sample, seconds; with 0 every query is a sample.
            samples: Number of samples: the queries in as many equal parts, a mean of each; of single queries at least so many.
            layers: Whether layers are timed too, one by one in a run of their own: ``layers`` of the answer are their names and
                mean times, milliseconds, in order.
        """
        single = sample_s <= 0.0
        with Folder() as folder:
            exported = os.path.join(folder, "times.json")
            warmup_s = max(warmup_s, SINGLE_WARMUP_S if single else LEAST_WARMUP_S)
            duration_s = 0.0 if single else max(sample_s * samples, LEAST_S)
            words = ["--warmUp=%d" % round(1e3 * warmup_s), "--duration=%g" % duration_s, "--iterations=%d" % samples]
            words += self._alone(spinning=True)
            profile = os.path.join(folder, "profile.json")
            if layers:
                words.append("--exportProfile=" + profile)
                # Since TensorRT 11 a run of their own is the default, and the option does nothing.
                words += ["--separateProfileRun"] if self._tag < TAG_11 else []
            self._run(words + ["--exportTimes=" + exported], folder, exported)
            rows = self._profiled(profile) if layers else None
            try:
                with open(exported) as file:
                    queries = [float(query["computeMs"]) for query in json.load(file)]
            except (ValueError, KeyError, TypeError) as error:
                raise self._refusal("times that cannot be read (%s)" % error)
        if not queries:
            raise self._refusal("no query in its times")
        count = len(queries) if single else min(samples, len(queries))
        number = len(queries) // count
        parts = [queries[part * number : (part + 1) * number] for part in range(count)]
        found = {
            "times_ms": [sum(part) / number for part in parts],
            "number": number,
            "stable": None,
            # The device's clock does not run while something else has a core.
            "cpu_share": [1.0] * count,
            "preempted": 0,
        }
        return found if rows is None else dict(found, layers=rows)

    def repeated(self, settle_s, seconds):
        """Repeat it without a pause in a process of its own; a `trtexec_replay.Replay`.

        What waits for the device sleeps: a core that spins meanwhile is no part of an inference.

        Args:
            settle_s: Warm-up, seconds.
            seconds: How long after it the replay is needed, seconds.
        """
        words = ["--warmUp=%d" % round(1e3 * settle_s), "--duration=%g" % (seconds + REPLAY_MORE_S), "--iterations=1"]
        command = self._command(words + self._alone(spinning=False))
        return trtexec_replay.Replay(command, RUN_S, self._refusal)

    def traced(self, runs):
        """What each layer takes, see `layers`: as trtexec tells it of at least 100 passes of its own."""
        rows = self.timed(LEAST_WARMUP_S, LEAST_S, 5, layers=True)["layers"]
        return [{"name": name, "op": None, "us": 1e3 * ms} for name, ms in rows]

    def compute(self, arrays):
        """Outputs by name for inputs by name (NumPy arrays).

        trtexec prints six digits of each value, so exact equality cannot be seen.
        """
        numpy = engines.require("numpy")
        with Folder() as folder:
            loads = []
            for number, name in enumerate(sorted(arrays)):
                if not PLAIN.match(name):
                    raise self._refusal("an input whose name is %r, which its options cannot hold" % name)
                place = os.path.join(folder, "input%d" % number)
                array = arrays[name]
                if array.dtype == numpy.int64 and self._tag < TAG_10:
                    # Before TensorRT 10 there are no 64-bit integers: the engine's are 32-bit ones.
                    array = array.astype(numpy.int32)
                numpy.ascontiguousarray(array).tofile(place)
                loads.append("%s:%s" % (name, place))
            exported = os.path.join(folder, "outputs.json")
            words = ["--loadInputs=" + ",".join(loads), "--exportOutput=" + exported]
            words += ["--iterations=1", "--warmUp=0", "--duration=0"]
            # Up to TensorRT 10 data are moved unless it is told otherwise, since TensorRT 11 only where it is told.
            if self._tag >= TAG_11:
                words.append("--includeDataTransfers")
            self._run(words, folder, exported)
            with open(exported, "rb") as file:
                return self._outputs(numpy, file.read().decode("utf-8", "replace"))

    def _profiled(self, path):
        """Name and mean time of each layer, milliseconds; the median is a multiple of the timer's tick."""
        try:
            # Names are written as they are: a control character in one is no damage.
            with open(path, "rb") as file:
                found = json.loads(file.read().decode("utf-8", "replace"), strict=False)
            return [[str(row["name"]), float(row["averageMs"])] for row in found if "name" in row]
        except (IOError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._refusal("a profile that cannot be read (%s)" % error)

    def _alone(self, spinning):
        """Options by which every release runs the device alone: no transfers, and a CUDA graph, which a DLA cannot have."""
        graph = not any(word.startswith("--useDLACore") for word in self._arguments)
        if self._tag < TAG_11:
            words = ["--noDataTransfers"] + (["--useSpinWait"] if spinning else [])
            return words + (["--useCudaGraph"] if graph else [])
        return ([] if spinning else ["--noSpinWait"]) + ([] if graph else ["--noCudaGraph"])

    def _command(self, words):
        return self._program + ["--loadEngine=" + self._source, "--device=0"] + self._arguments + words

    def _run(self, words, folder, wanted=None):
        try:
            done = subprocess.run(
                self._command(words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=RUN_S,
                cwd=folder,
            )
        except subprocess.TimeoutExpired:
            raise self._refusal("no end within %d s" % RUN_S)
        if done.returncode == 0 and (wanted is None or os.path.isfile(wanted)):
            return
        log = done.stdout.decode("utf-8", "replace")
        said = [line.partition("[E]")[2].strip() for line in log.splitlines() if "[E]" in line]
        raise self._refusal((said or ["exit code %d and no error" % done.returncode])[0][:400])

    def _outputs(self, numpy, text):
        """Arrays of an export. It is no JSON where a value is nan or inf, so it is read by its own form."""
        found = {}
        for name, dimensions, values in RESULT.findall(text):
            shape = tuple(int(size) for size in re.findall(r"\d+", dimensions))
            numbers = numpy.array([float(value) for value in values.split(",") if value.strip()])
            size = 1
            for length in shape:
                size *= length
            if numbers.size != size:
                raise self._refusal("%d values for an output of shape %s" % (numbers.size, list(shape)))
            found[name] = numbers.reshape(shape)
        if not found:
            raise self._refusal("no outputs in its export")
        return found

    def _refusal(self, found):
        tag = getattr(self, "_tag", None)
        return failures.Failure(
            error="BackendError",
            message="trtexec%s on the board must run the engine, found: %s."
            % ("" if tag is None else " of TensorRT %s" % trtexec.version(tag), found.rstrip(".")),
            hint="edgeprune compile --backend tensorrt --board BOARD, on that very board",
        )


class Folder(object):
    """A folder for as long as a block lasts."""

    def __enter__(self):
        self.path = tempfile.mkdtemp(prefix="edgeprune-")
        return self.path

    def __exit__(self, kind, error, trace):
        shutil.rmtree(self.path, ignore_errors=True)
