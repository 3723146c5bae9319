"""What trtexec does, by TensorRT's Python module, for boards that have the module and not the program. Python >= 3.6.

It takes those of trtexec's options that the host uses and writes the same files, so the rest of edgeprune does not tell the two
apart. It is started as a program of its own, since a build must outlive the host; see `builds.Step`.

Source of the calls: NVIDIA/TensorRT, python/src/infer/pyCore.cpp and python/src/parsers/pyOnnx.cpp at v8.6.1, v10.3.0 and v11.1.
"""

import importlib.util
import os
import subprocess
import sys

ENTRY = "import sys; sys.path.insert(0, sys.argv.pop(1)); import trtpython; sys.exit(trtpython.main(sys.argv[1:]))"
WHERE = "import importlib.util as u; found = u.find_spec('tensorrt'); print(found.origin if found else '')"
ANSWER_S = 60.0
# Options with a value, and without.
VALUES = (
    "--onnx",
    "--saveEngine",
    "--loadEngine",
    "--exportLayerInfo",
    "--exportProfile",
    "--exportTimes",
    "--exportOutput",
    "--loadInputs",
    "--profilingVerbosity",
    "--timingCacheFile",
    "--device",
    "--useDLACore",
    "--memPoolSize",
    "--warmUp",
    "--duration",
    "--iterations",
)
WORDS = (
    "--skipInference",
    "--noTF32",
    "--fp16",
    "--int8",
    "--allowGPUFallback",
    "--noDataTransfers",
    "--includeDataTransfers",
    "--useSpinWait",
    "--noSpinWait",
    "--separateProfileRun",
    "--useCudaGraph",
    "--noCudaGraph",
    "--help",
)
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")


class Refused(Exception):
    """Ends the program; its words are for the log."""


def located():
    """(command that starts this as a program, file of the module), or None where no Python of the board has the module."""
    here = importlib.util.find_spec("tensorrt")
    python, origin = sys.executable, here.origin if here is not None else None
    if not origin and sys.prefix != sys.base_prefix:
        # JetPack's module lies with the system's Python, which edgeprune's environment does not see.
        python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        origin = _said([python, "-c", WHERE]).strip()
    if not origin or not os.path.isfile(origin):
        return None
    return [python, "-c", ENTRY, os.path.abspath(sys.argv[0])], origin


def first_words(words):
    """What trtexec's first line says of the release, for the Python of a command of `located`; else why it says nothing."""
    return _said([words[0], "-c", "import tensorrt; print('tensorrt ' + tensorrt.__version__)"], tagged=True)


def _said(command, tagged=False):
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=ANSWER_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    text = done.stdout.decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.startswith("tensorrt ")]
    return "[TensorRT v%d]" % tag(lines[-1].split()[1]) if tagged and lines else text


def tag(version):
    """``NV_TENSORRT_VERSION`` of a version in words, as trtexec prints it: 8601 for 8.6.1, 100300 for 10.3.0."""
    numbers = [int(part) if part.isdigit() else 0 for part in version.split(".")[:3]] + [0, 0]
    unit = 10000 if numbers[0] >= 10 else 1000
    return numbers[0] * unit + numbers[1] * 100 + numbers[2]


def main(arguments):
    """Build, or load and run, as trtexec would; the exit code."""
    try:
        given = parsed(arguments)
        import tensorrt

        say("[I]", "&&&& RUNNING TensorRT by its Python module [TensorRT v%d]" % tag(tensorrt.__version__))
        log = logger(tensorrt)
        if "--onnx" in given:
            plan = build(tensorrt, log, given)
            say("[I]", "Created engine with size: %.3f MiB" % (len(plan) / 1048576.0))
        else:
            with open(given["--loadEngine"], "rb") as file:
                plan = file.read()
        engine = load(tensorrt, log, plan, given)
        if "--exportLayerInfo" in given:
            told = engine.create_engine_inspector().get_engine_information(tensorrt.LayerInformationFormat.JSON)
            write(given["--exportLayerInfo"], told.encode("utf-8"))
        if "--skipInference" not in given:
            import trtpython_run

            trtpython_run.infer(tensorrt, engine, given)
    except Refused as refused:
        say("[E]", str(refused))
        return 1
    except OSError as error:
        say("[E]", "%s: %s" % (error.filename, error.strerror))
        return 1
    return 0


def parsed(arguments):
    """Options to their values; what is none of trtexec's that are known here is refused in its words."""
    given = {}
    for word in arguments:
        name, sign, value = word.partition("=")
        if not (name in VALUES and sign or name in WORDS and not sign):
            raise Refused("Unknown option: %s" % name)
        given[name] = value
    if ("--onnx" in given) == ("--loadEngine" in given):
        raise Refused("one of --onnx and --loadEngine must be given")
    return given


def say(prefix, text):
    """A line for the log, at once."""
    for line in text.splitlines():
        sys.stderr.write("%s %s\n" % (prefix, line))
    sys.stderr.flush()


def write(path, content):
    """A file that is there whole or not at all."""
    with open(path + ".partial", "wb") as file:
        file.write(content)
    os.replace(path + ".partial", path)


def logger(tensorrt):
    """TensorRT's own messages in the log, in trtexec's form."""

    class Log(tensorrt.ILogger):
        def __init__(self):
            tensorrt.ILogger.__init__(self)

        def log(self, severity, msg):
            place = [getattr(tensorrt.ILogger, name) for name in SEVERITIES].index(severity)
            if place < 4:
                say(("[E] [TRT]", "[E] [TRT]", "[W] [TRT]", "[I] [TRT]")[place], msg)

    return Log()


def build(tensorrt, log, given):
    """Bytes of the engine of a model."""
    builder = tensorrt.Builder(log)
    networks = tensorrt.NetworkDefinitionCreationFlag
    # Before TensorRT 10 a batch dimension of the model's own has to be asked for; later there is nothing else.
    old = tag(tensorrt.__version__) < 100000
    network = builder.create_network(1 << int(networks.EXPLICIT_BATCH) if old else 0)
    parser = tensorrt.OnnxParser(network, log)
    if not parser.parse_from_file(given["--onnx"]):
        for number in range(parser.num_errors):
            say("[E]", parser.get_error(number).desc())
        raise Refused("Failed to parse onnx file")
    config = builder.create_builder_config()
    set_up(tensorrt, config, given)
    timings = given.get("--timingCacheFile")
    if timings:
        known = b""
        if os.path.isfile(timings):
            with open(timings, "rb") as file:
                known = file.read()
            say("[I]", "Loaded %d bytes of timing cache from %s" % (len(known), timings))
        config.set_timing_cache(config.create_timing_cache(known), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused("Engine could not be created from network")
    content = bytes(plan)
    if timings:
        write(timings, bytes(config.get_timing_cache().serialize()))
    if "--saveEngine" in given:
        write(given["--saveEngine"], content)
    return content


def set_up(tensorrt, config, given):
    """What the options ask of a build."""
    flags = tensorrt.BuilderFlag
    config.profiling_verbosity = getattr(tensorrt.ProfilingVerbosity, given.get("--profilingVerbosity", "none").upper())
    if "--noTF32" in given:
        config.clear_flag(flags.TF32)
    for word, name in (("--fp16", "FP16"), ("--int8", "INT8"), ("--allowGPUFallback", "GPU_FALLBACK")):
        if word in given:
            # Since TensorRT 11 types are the graph's; an option that asks for one is unknown there, as it is to trtexec.
            if not hasattr(flags, name):
                raise Refused("Unknown option: %s" % word)
            config.set_flag(getattr(flags, name))
    pool, _, size = given.get("--memPoolSize", "").partition(":")
    if pool:
        if pool != "workspace" or not size.isdigit():
            raise Refused("--memPoolSize must be workspace:MIB, found %s" % given["--memPoolSize"])
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, int(size) << 20)
    if "--useDLACore" in given:
        config.default_device_type = tensorrt.DeviceType.DLA
        config.DLA_core = int(given["--useDLACore"])


def load(tensorrt, log, plan, given):
    """The engine of its bytes."""
    runtime = tensorrt.Runtime(log)
    if "--useDLACore" in given:
        runtime.DLA_core = int(given["--useDLACore"])
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise Refused("Engine deserialization failed")
    return engine
