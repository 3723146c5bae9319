"""Parity on the board: run an engine on the golden inputs and say how far its outputs are from the golden ones.

Python >= 3.6; numpy and the runtime on use. ``golden.npz`` holds ``input_0``, ``input_1``, ... and ``output_0``, ... in the
order of ``model.json``, each of shape (cases, deployment shape), and ``kinds`` (cases,): ``"sample"`` or the name of an edge
case. Nothing in it is pickled.

An output passes when in every case its largest absolute difference is at most ``relative`` times the output's scale, and its
signal-to-noise ratio over the samples is at least ``snr_db``. The scale of a case is the largest golden magnitude in it, but
not less than what is typical (the median over the samples): an edge case with huge outputs cannot hide an error of ordinary
ones, and an output that is nearly 0 is not held to digits that nobody can have.
"""

import json
import math
import os
import resource
import time

import engines
import releases
from failures import Failure


def main(request, emit):
    """Verb ``parity``.

    Request: ``release`` (a folder of ``releases``, or ``"current"``) or ``folder`` (an artifact's, for the check on a host);
    ``engine``, ``golden``, ``model``: file names there; ``runtime``, ``threads``; ``tolerance``: ``{"relative", "snr_db"}``;
    ``tolerances``: the same by output, for those that have one of their own; ``cases``: run only the first so many.

    Result: ``passed``, ``cases``, ``max_abs``, ``required_relative`` (the tolerance that would have passed), ``snr_db``
    (None: exact), ``cosine``, ``nan``, ``inf``, ``top1_agreement`` (None where no output looks like logits), ``outputs``
    (the same for each), ``load_ms``, ``peak_memory_bytes``.
    """
    numpy = engines.require("numpy")
    folder = request["folder"] if "folder" in request else releases.resolve(request["root"], request["release"])
    with open(os.path.join(folder, request["model"]), "rb") as stream:
        model = json.loads(stream.read().decode("utf-8"))
    started = time.perf_counter()
    # A release's folder serves as a store whose files have names instead of hashes.
    engine = engines.load({"blob": request["engine"]}, folder, request["runtime"], request["threads"])
    load_ms = (time.perf_counter() - started) * 1e3
    names = [tensor["name"] for tensor in model["inputs"]]
    with numpy.load(os.path.join(folder, request["golden"]), allow_pickle=False) as golden:
        kinds = [str(kind) for kind in golden["kinds"]][: request.get("cases")]
        inputs = [golden["input_%d" % index] for index in range(len(names))]
        expected = [golden["output_%d" % index] for index in range(len(model["outputs"]))]
    differences = [Difference(tensor["name"]) for tensor in model["outputs"]]
    for case, kind in enumerate(kinds):
        found = _compute(engine, {name: values[case] for name, values in zip(names, inputs)})
        for difference, values in zip(differences, expected):
            if difference.name not in found:
                raise Failure(
                    "ParityError",
                    "the engine must have output %r, found %s." % (difference.name, ", ".join(sorted(found))),
                    "compile the artifact again",
                )
            difference.add(values[case], found[difference.name], kind)
        emit({"event": "case", "done": case + 1, "of": len(kinds)})
    own = request.get("tolerances", {})
    outputs = [difference.report(own.get(difference.name, request["tolerance"])) for difference in differences]
    result = summary(outputs)
    result["cases"] = len(kinds)
    result["load_ms"] = round(load_ms, 3)
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


class Difference(object):
    """Collects, case by case, how far one output is from its golden values.

    Args:
        name: The output's.
    """

    def __init__(self, name):
        self.name = name
        self.numpy = engines.require("numpy")
        self.cases = []
        self.signal = self.noise = self.dot = self.power = 0.0
        self.nan = self.inf = self.misplaced = 0
        self.rows = self.same = 0

    def add(self, golden, found, kind):
        """Compare one case; `golden` and `found` are arrays of one shape.

        Raises:
            Failure: ParityError when the shapes differ.
        """
        numpy = self.numpy
        if golden.shape != found.shape:
            raise Failure(
                "ParityError",
                "output %r must have shape %s, found %s." % (self.name, list(golden.shape), list(found.shape)),
                "compile the artifact again",
            )
        logits = golden.ndim == 2 and golden.shape[1] > 1 and golden.dtype.kind == "f"
        want, have = golden.astype(numpy.float64), found.astype(numpy.float64)
        finite = numpy.isfinite(want)
        self.nan += int(numpy.isnan(have[finite]).sum())
        self.inf += int(numpy.isinf(have[finite]).sum())
        # Where the golden output itself is NaN or infinite, the engine's must be just that.
        self.misplaced += int((~((want == have) | (numpy.isnan(want) & numpy.isnan(have))))[~finite].sum())
        both = finite & numpy.isfinite(have)
        want_finite, have_finite = want[both], have[both]
        gap = numpy.abs(want_finite - have_finite)
        scale = float(numpy.abs(want[finite]).max()) if finite.any() else 0.0
        self.cases.append((kind, float(gap.max()) if gap.size else 0.0, scale))
        if kind == "sample":
            self.signal += float((want_finite**2).sum())
            self.noise += float((gap**2).sum())
            self.dot += float((want_finite * have_finite).sum())
            self.power += float((have_finite**2).sum())
            if logits:
                self.rows += golden.shape[0]
                self.same += int((want.argmax(axis=1) == have.argmax(axis=1)).sum())

    def report(self, tolerance):
        """What was found, and whether it passes; a dict that JSON can hold."""
        typical = sorted(scale for kind, _, scale in self.cases if kind == "sample") or [0.0]
        floor = typical[len(typical) // 2]
        worst = (-1.0, 0.0, 0.0, "")
        for number, (kind, gap, scale) in enumerate(self.cases):
            # An output that is 0 throughout has no scale; there the tolerance is absolute.
            relative = gap / (max(scale, floor) or 1.0)
            worst = max(worst, (relative, gap, max(scale, floor), "%s %d" % (kind, number)))
        snr = None
        if self.noise > 0.0:
            snr = 10.0 * math.log10(self.signal / self.noise) if self.signal > 0.0 else -300.0
        norms = math.sqrt(self.signal) * math.sqrt(self.power)
        strays = self.nan + self.inf + self.misplaced
        return {
            "name": self.name,
            "passed": strays == 0
            and worst[0] <= tolerance["relative"]
            and (snr is None or snr >= tolerance["snr_db"] or self.signal == 0.0),
            "max_abs": max(gap for _, gap, _ in self.cases),
            "scale": worst[2],
            "required_relative": worst[0],
            "worst_case": worst[3],
            "snr_db": snr,
            "cosine": self.dot / norms if norms > 0.0 else 1.0 if self.noise == 0.0 else 0.0,
            "nan": self.nan,
            "inf": self.inf,
            "misplaced": self.misplaced,
            "top1_agreement": float(self.same) / self.rows if self.rows else None,
        }


def summary(outputs):
    """The worst of all outputs."""
    ratios = [output["snr_db"] for output in outputs if output["snr_db"] is not None]
    agreements = [output["top1_agreement"] for output in outputs if output["top1_agreement"] is not None]
    return {
        "passed": all(output["passed"] for output in outputs),
        "max_abs": max(output["max_abs"] for output in outputs),
        "required_relative": max(output["required_relative"] for output in outputs),
        "snr_db": min(ratios) if ratios else None,
        "cosine": min(output["cosine"] for output in outputs),
        "nan": sum(output["nan"] for output in outputs),
        "inf": sum(output["inf"] for output in outputs),
        "top1_agreement": min(agreements) if agreements else None,
        "outputs": outputs,
    }


def _compute(engine, arrays):
    try:
        return engine.compute(arrays)
    except Exception as error:  # the runtime's exception classes differ between versions; all of them end here
        raise Failure(
            "BackendError",
            "the engine must run on the golden inputs, found: %s." % " ".join(str(error).split())[:400].rstrip("."),
            "compile the artifact again",
        ) from error
