"""Energy and power of NVIDIA graphics cards through the driver's own library. Python >= 3.6, ctypes.

Sources: NVIDIA, NVML API Reference: nvmlDeviceGetTotalEnergyConsumption (millijoules since the driver was loaded, Volta and
later), nvmlDeviceGetPowerUsage (milliwatts; an average over one second on Ampere, GA100 excepted, and later, a value of one
moment before), nvmlReturn_t. On Jetson boards the library loads and initializes, and then answers NOT_SUPPORTED to every
question of power (https://github.com/HazyResearch/intelligence-per-watt/issues/40).
"""

import ctypes

from power_source import AVERAGE, ENERGY, POWER, SHARE, Channel, Source, absent

NAME = "nvml"
LIBRARY = "libnvidia-ml.so.1"
ERRORS = {
    1: "UNINITIALIZED",
    2: "INVALID_ARGUMENT",
    3: "NOT_SUPPORTED",
    4: "NO_PERMISSION",
    6: "NOT_FOUND",
    9: "DRIVER_NOT_LOADED",
    12: "LIBRARY_NOT_FOUND",
    13: "FUNCTION_NOT_FOUND",
    15: "GPU_IS_LOST",
    18: "LIB_RM_VERSION_MISMATCH",
    999: "UNKNOWN",
}
_STATED = "NVIDIA, NVML API Reference, nvmlDeviceGetPowerUsage"
_MOST_GPUS = 64


def find(tree, request):
    """See `power_source`. A captured tree has no driver; `request` may name another library as ``nvml``."""
    if not tree.live:
        return [], []
    try:
        library = ctypes.CDLL(request.get("nvml") or LIBRARY)
    except OSError:
        return [], [absent(NAME, "there is no NVIDIA driver library (%s)." % LIBRARY)]
    said = call(library, "nvmlInit_v2")
    if said:
        return [], [absent(NAME, "the NVIDIA driver library is there, but does not start: %s." % said, there=True)]
    count = ctypes.c_uint(0)
    said = call(library, "nvmlDeviceGetCount_v2", ctypes.byref(count))
    if said or not count.value:
        return [], [absent(NAME, "the NVIDIA driver lists no GPU%s." % (" (%s)" % said if said else ""), there=True)]
    sources, absences = [], []
    for index in range(min(count.value, _MOST_GPUS)):
        found, reason = _gpu(library, index)
        sources.extend(found)
        if reason is not None:
            absences.append(absent(NAME, reason, there=True))
    return sources, absences


def call(library, function, *arguments):
    """Call one function; None when it succeeded, else what it said."""
    try:
        code = getattr(library, function)(*arguments)
    except AttributeError:
        return "%s is missing in this driver" % function
    return None if code == 0 else "%s said %s" % (function, ERRORS.get(code, "error %d" % code))


def _gpu(library, index):
    handle = ctypes.c_void_p()
    said = call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    if said:
        return [], "GPU %d cannot be asked: %s." % (index, said)
    rail = "GPU %d" % index
    kind, window_s = meaning(_capability(library, handle))
    counter = Channel(NAME, rail, ENERGY, SHARE, window_s=0.0, detail="energy")
    usage = Channel(NAME, rail, kind, SHARE, window_s=window_s, stated=_STATED, detail="power")
    sources, refusals = [], []
    # The counter first: it misses nothing between two readings.
    for channel, function, number_type in (
        (counter, "nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong),
        (usage, "nvmlDeviceGetPowerUsage", ctypes.c_uint),
    ):
        value = number_type(0)
        said = call(library, function, handle, ctypes.byref(value))
        if said:
            refusals.append(said)
        else:
            sources.append(Source([channel], _reader(library, handle, function, number_type, channel.name)))
    if sources:
        return sources, None
    return [], "%s is listed by the driver, but its power cannot be read: %s." % (rail, ", ".join(refusals))


def _capability(library, handle):
    """(major, minor) of the compute capability, or None."""
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    said = call(library, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    return None if said else (major.value, minor.value)


def meaning(capability):
    """(kind, averaging window in seconds) of nvmlDeviceGetPowerUsage by compute capability; (8, 0) is GA100."""
    if capability is None:
        return POWER, None
    return (AVERAGE, 1.0) if capability > (8, 0) else (POWER, 0.0)


def _reader(library, handle, function, number_type, name):
    def read():
        value = number_type(0)
        said = call(library, function, handle, ctypes.byref(value))
        return {} if said else {name: float(value.value)}

    return read
