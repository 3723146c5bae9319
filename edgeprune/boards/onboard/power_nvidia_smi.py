"""Power of NVIDIA graphics cards as ``nvidia-smi`` prints it, where its library cannot be loaded. Python >= 3.6.

Source: ``nvidia-smi --help-query-gpu``: power.draw.instant is the last measured value; power.draw of older drivers is an
average over the last second on Ampere (GA100 excepted) and newer, else the last measured value.
"""

from power_source import AVERAGE, POWER, SHARE, Channel, Source, absent, number

NAME = "nvidia-smi"
INTERVAL_MS = 100
# Field, kind and window: what the program's help says of it. Newer drivers know the first.
FIELDS = (("power.draw.instant", POWER, 0.0), ("power.draw", AVERAGE, 1.0))
_STATED = "nvidia-smi --help-query-gpu; asked for every %d ms" % INTERVAL_MS


def find(tree, request):
    """See `power_source`."""
    program = tree.find_program("nvidia-smi")
    if program is None:
        return [], [absent(NAME, "there is no nvidia-smi.")]
    for field, kind, window_s in FIELDS:
        query = ["--query-gpu=index,%s" % field, "--format=csv,noheader,nounits"]
        found = parse(tree.run("nvidia-smi", *query) or "")
        readable = sorted(index for index, value in found.items() if value is not None)
        if readable:
            channels = {
                index: Channel(
                    NAME,
                    "GPU %d" % index,
                    kind,
                    SHARE,
                    period_s=INTERVAL_MS / 1000.0,
                    window_s=window_s,
                    stated=_STATED,
                )
                for index in readable
            }
            command = [program] + query + ["-lms", str(INTERVAL_MS)]
            return [Source(list(channels.values()), stream=command, parse=_line_parser(channels))], []
    return [], [absent(NAME, "nvidia-smi is there, but tells no GPU's power ([N/A] or an error).", there=True)]


def parse(text):
    """Milliwatts by index of the GPU; None where it says ``[N/A]`` or ``[Not Supported]``."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 2 and cells[0].isdigit() and len(cells[0]) < 6:
            watts = number(cells[1])
            found[int(cells[0])] = None if watts is None else watts * 1000.0
    return found


def _line_parser(channels):
    def read_line(text):
        found = parse(text)
        known = {index: value for index, value in found.items() if index in channels and value is not None}
        return None, {channels[index].name: value for index, value in known.items()}

    return read_line
