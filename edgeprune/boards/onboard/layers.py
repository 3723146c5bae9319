"""What each kernel of one engine takes, by the runtime's own trace. Python >= 3.6.

A trace costs time itself, some microseconds for each kernel: its times are for telling kernels apart, and the whole is timed
without.
"""

import json
import os

import bench
import engines
import failures

_WARMUP_S, _SAMPLE_S, _SAMPLES, _ITEM_S = 0.05, 0.02, 5, 2.0


def main(request, emit):
    """Verb ``layers``.

    Request: ``engine`` (an entry, see `engines`), ``runtime``, ``threads``, ``runs`` (that are traced). Result: ``kernels``, in
    the order of a run: ``[{"name", "op" (None where the runtime does not say), "us"}]``, and ``whole_ms``, of runs without a trace.
    """
    runtime, threads = request["runtime"], int(request.get("threads", 1))
    store = os.path.join(os.path.expanduser(request["root"]), "store")
    engine = engines.load(request["engine"], store, runtime, threads)
    if not hasattr(engine, "traced"):
        raise failures.Failure(
            error="BackendUnavailableError",
            message="the runtime must tell what each kernel takes, found that %s does not." % runtime,
        )
    engine.bind()
    if hasattr(engine, "timed"):
        item = engine.timed(_WARMUP_S, _SAMPLE_S, _SAMPLES)
    else:
        item = bench.time_item(engine, _WARMUP_S, _SAMPLE_S, _SAMPLES, _ITEM_S, [], threads)
    whole_ms = bench.median(bench.own_times(item))
    return {"kernels": engine.traced(int(request.get("runs", 50))), "whole_ms": whole_ms}


def middle(values):
    """Mean of the middle half: finer than the median of a clock that counts microseconds, and as hard to disturb."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    kept = ordered[quarter : len(ordered) - quarter]
    return sum(kept) / float(len(kept))


def of_onnxruntime(text):
    """Kernels by a trace that ONNX Runtime wrote (``SessionOptions.enable_profiling``), in the order in which they first ran."""
    found, order = {}, []
    for event in json.loads(text):
        name = event.get("name", "")
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        told = event.get("args", {})
        key = (told.get("node_index"), name)
        if key not in found:
            found[key] = []
            order.append((key, told.get("op_name")))
        found[key].append(float(event["dur"]))
    return [{"name": key[1][: -len("_kernel_time")], "op": op, "us": middle(found[key])} for key, op in order]
