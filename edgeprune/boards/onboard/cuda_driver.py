"""How many multiprocessors CUDA's first device has, as the driver's own library says. Python >= 3.6, stdlib only.

``nvidia-smi`` has no such field, and on a Jetson it may not be there at all. The library is asked in a process of its own, since
a driver that does not fit the kernel can hang or end who asks it.

Source: NVIDIA, CUDA Driver API, Initialization, Device Management (``CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`` is 16) and Error
Handling. Device 0 of CUDA's own order is the one that edgeprune's engines are built for and run on.
"""

import ctypes
import subprocess
import sys

LIBRARY = "libcuda.so.1"
DEADLINE_S = 20.0
"""Loading a driver that nothing uses yet takes seconds."""

_ASK = """
import ctypes
import sys

cuda = ctypes.CDLL(sys.argv[1])
device, count = ctypes.c_int(), ctypes.c_int()
for name, arguments in (
    ("cuInit", (ctypes.c_uint(0),)),
    ("cuDeviceGet", (ctypes.byref(device), ctypes.c_int(0))),
    ("cuDeviceGetAttribute", (ctypes.byref(count), ctypes.c_int(16), device)),
):
    status = getattr(cuda, name)(*arguments)
    if status:
        said = ctypes.c_char_p()
        cuda.cuGetErrorName(ctypes.c_int(status), ctypes.byref(said))
        sys.exit("%s says %s" % (name, (said.value or b"").decode("ascii", "replace") or status))
print(count.value)
"""


def multiprocessors():
    """How many there are, or None, and why that is not known: nothing where there is no driver to ask."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return None, ""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK, LIBRARY],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, "%s does not answer (%s)" % (LIBRARY, type(error).__name__)
    said = done.stdout.decode("ascii", "replace").strip()
    if done.returncode == 0 and said.isdigit() and int(said) > 0:
        return int(said), ""
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    why = lines[-1] if lines else "exit code %d" % done.returncode if done.returncode else "it says %s" % said
    return None, "%s: %s" % (LIBRARY, why)
