"""What the processor is: model, instruction sets, caches, cores."""

import os
import re
import struct

from failures import Failure
from tree import Tree

# What decides which kernels a runtime picks; the kernel's own names. Everything else in `flags` is noise to a table.
X86_FLAGS = frozenset(
    "sse2 ssse3 sse4_1 sse4_2 avx avx2 fma f16c bmi1 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl avx512vbmi"
    " avx512_vbmi2 avx512_vnni avx512_bitalg avx512_bf16 avx512_fp16 avx_vnni avx_vnni_int8 avx_ifma avx_ne_convert"
    " amx_tile amx_int8 amx_bf16 amx_fp16 avx10".split()
)
ARM_FLAGS = frozenset(
    "fp asimd atomics fphp asimdhp asimdrdm fcma asimddp sve asimdfhm sve2 svei8mm svef32mm svef64mm svebf16 i8mm bf16"
    " sme neon vfpv3 vfpv4 half".split()
)

# Source: Linux, arch/arm64/include/uapi/asm/hwcap.h. These bits are an ABI; they never move.
HWCAP = {0: "fp", 1: "asimd", 8: "atomics", 9: "fphp", 10: "asimdhp", 12: "asimdrdm", 14: "fcma", 20: "asimddp",
         22: "sve", 23: "asimdfhm"}  # fmt: skip
HWCAP2 = {1: "sve2", 9: "svei8mm", 10: "svef32mm", 11: "svef64mm", 12: "svebf16", 13: "i8mm", 14: "bf16", 23: "sme"}
AT_HWCAP, AT_HWCAP2 = 16, 26

# Source: Linux, arch/arm64/include/asm/cputype.h (implementer and part numbers of MIDR_EL1).
CORES = {
    (0x41, 0xD03): "Cortex-A53", (0x41, 0xD04): "Cortex-A35", (0x41, 0xD05): "Cortex-A55", (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72", (0x41, 0xD09): "Cortex-A73", (0x41, 0xD0A): "Cortex-A75", (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0C): "Neoverse-N1", (0x41, 0xD0D): "Cortex-A77", (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE", (0x41, 0xD44): "Cortex-X1", (0x41, 0xD46): "Cortex-A510", (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD48): "Cortex-X2", (0x41, 0xD49): "Neoverse-N2", (0x41, 0xD4B): "Cortex-A78C", (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD4E): "Cortex-X3", (0x41, 0xD4F): "Neoverse-V2", (0x41, 0xD80): "Cortex-A520", (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4", (0x4E, 0x003): "Denver 2", (0x4E, 0x004): "Carmel",
}  # fmt: skip


def is_arm(architecture):
    """Whether ``uname -m`` names an ARM machine."""
    return architecture.startswith(("aarch64", "arm"))


def entries(tree):
    """``/proc/cpuinfo`` as one dictionary per processor; ARM kernels append one for the machine, which is left out."""
    blocks = []
    for block in re.split(r"\n\s*\n", tree.read("/proc/cpuinfo") or ""):
        fields = {}
        for line in block.splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
        if "processor" in fields:
            blocks.append(fields)
    return blocks


def foreign(tree, architecture, processors):
    """Whether the kernel runs on another architecture than the process: user-mode emulation.

    Such emulators answer ``uname`` themselves and hand most files through: cpuinfo (qemu-user until version 8.2), and the
    kernel's own word since Linux 6.1.
    """
    kernel = tree.read("/proc/sys/kernel/arch")
    if kernel:
        return is_arm(kernel.strip()) != is_arm(architecture)
    return is_arm(architecture) and bool(processors) and "vendor_id" in processors[0] and "flags" in processors[0]


def emulated():
    """Whether this process runs on an emulated processor, where nothing that is timed means anything."""
    tree = Tree()
    return foreign(tree, os.uname().machine, entries(tree))


def cpu_model(tree, architecture, processors):
    """As the kernel names it; ARM part numbers get their names; clusters are counted: ``4x Cortex-A55 + 4x ...``."""
    if foreign(tree, architecture, processors):
        return "unknown"
    names = [processor["model name"] for processor in processors if processor.get("model name")]
    if names and not is_arm(architecture):
        return names[0]
    parts = [core_name(processor) for processor in processors if "CPU part" in processor]
    if not parts:
        midr = tree.read_int("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1")
        if midr is None:
            return names[0] if names else "unknown"
        return part_name(midr >> 24 & 0xFF, midr >> 4 & 0xFFF)
    distinct = sorted(set(parts), key=parts.index)
    if len(distinct) == 1:
        return distinct[0]
    return " + ".join("%dx %s" % (parts.count(name), name) for name in distinct)


def core_name(processor):
    """Name of one ARM core from its cpuinfo fields."""
    try:
        return part_name(int(processor.get("CPU implementer", "0"), 0), int(processor["CPU part"], 0))
    except ValueError:
        return "unknown"


def part_name(implementer, part):
    """Name of an ARM part, or its numbers where this file does not know it."""
    return CORES.get((implementer, part), "ARM implementer 0x%02x part 0x%03x" % (implementer, part))


def isa(tree, architecture, processors):
    """Sorted instruction set flags that matter to kernels.

    On 64-bit ARM they come from the auxiliary vector, which is the process's own, not from cpuinfo, which an emulator
    may pass through from another machine.
    """
    if architecture == "aarch64":
        flags = hwcap_flags(tree.read_bytes("/proc/self/auxv"))
        if flags or foreign(tree, architecture, processors):
            return sorted(flags)
    known = ARM_FLAGS if is_arm(architecture) else X86_FLAGS
    found = [set((p.get("flags") or p.get("Features") or p.get("isa") or "").split()) for p in processors]
    # Kernels may run on any core, so only what all of them have counts.
    return sorted(known.intersection(*found)) if found else []


def hwcap_flags(auxv):
    """Flag names from the content of ``/proc/self/auxv`` of a 64-bit process."""
    flags = set()
    for offset in range(0, len(auxv or b"") - 15, 16):
        kind, value = struct.unpack_from("=QQ", auxv, offset)
        names = {AT_HWCAP: HWCAP, AT_HWCAP2: HWCAP2}.get(kind, {})
        flags.update(name for bit, name in names.items() if value >> bit & 1)
    return flags


def caches(tree, core=0):
    """Sizes in bytes of the caches that a core sees: {"L1d": ..., "L1i": ..., "L2": ..., "L3": ...}."""
    sizes = {}
    for folder in tree.glob("/sys/devices/system/cpu/cpu%d/cache/index[0-9]*" % core):
        level, kind = tree.read_int(folder + "/level"), tree.read(folder + "/type")
        match = re.match(r"^(\d+)([KMG]?)$", tree.read(folder + "/size") or "")
        if level is None or match is None:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        sizes["L%d%s" % (level, suffix)] = int(match.group(1)) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[
            match.group(2)
        ]
    return sizes


def cores(tree, processors):
    """Logical cores that this process may use; for a captured tree, those that it lists."""
    if tree.live and hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return len(processors) or 1


def first(tree):
    """The first core that this process may use; for a captured tree, core 0."""
    return min(os.sched_getaffinity(0)) if tree.live and hasattr(os, "sched_getaffinity") else 0


def bind(wanted):
    """Let this process, and what it starts from now on, run on some cores alone.

    Raises:
        failures.Failure: They are not all there for it.
    """
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    try:
        os.sched_setaffinity(0, wanted)
        bound = sorted(os.sched_getaffinity(0)) == sorted(wanted)
    except (AttributeError, OSError, OverflowError, ValueError):
        bound = False
    if not bound:
        raise Failure(
            "CommandError",
            "the board must let its user have the cores %s, found %s."
            % (", ".join(map(str, wanted)), ", ".join(map(str, there)) or "a system that binds nothing to cores"),
            "edgeprune device add NAME --cores LIST --replace, with others",
        )


def quota(tree):
    """Cores' worth of time that control groups leave this process, e.g. 1.5, or None where they do not bound it.

    The kernel's ``cpu.max`` (cgroup v2) and ``cpu.cfs_quota_us`` (v1); those of all parents hold too.
    """
    found = []
    for line in (tree.read("/proc/self/cgroup") or "").splitlines():
        fields = line.split(":", 2)
        if len(fields) < 3 or not (fields[1] == "" or "cpu" in fields[1].split(",")):
            continue
        parts = [part for part in fields[2].split("/") if part]
        for count in range(len(parts) + 1):
            below = "".join("/" + part for part in parts[:count])
            if fields[1] == "":
                words = (tree.read("/sys/fs/cgroup%s/cpu.max" % below) or "").split()
            else:
                folder = "/sys/fs/cgroup/cpu%s/cpu.cfs_" % below
                words = [tree.read(folder + name) or "" for name in ("quota_us", "period_us")]
            if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
                found.append(int(words[0]) / float(words[1]))
    return min(found) if found else None


def hypervisor(tree, processors):
    """What the machine is a guest of, or None."""
    vendor = tree.read("/sys/class/dmi/id/sys_vendor") or ""
    product = tree.read("/sys/class/dmi/id/product_name") or ""
    named = re.search(
        r"QEMU|KVM|VMware|VirtualBox|Xen|Virtual Machine|Amazon EC2|Google Compute|OpenStack|Bochs|Parallels|Firecracker",
        vendor + " " + product,
    )
    if named and "metal" not in product:
        return (vendor + " " + product).strip()
    kind = tree.read("/sys/hypervisor/type") or tree.read("/proc/device-tree/hypervisor/compatible")
    if kind:
        return kind
    if processors and "hypervisor" in processors[0].get("flags", "").split():
        return "a hypervisor that does not name itself"
    return None
