"""Run the release that this file came with. Python >= 3.6, numpy, ONNX Runtime; nothing of edgeprune.

    from infer import Model

    model = Model("/home/me/.edgeprune/current")
    outputs = model.run({"image": image})    # NumPy arrays by name
    model = model.fresh()                    # another one where ``current`` was switched meanwhile, else the same

``python3 ~/.edgeprune/current/infer.py NAME=FILE.npy ...`` runs it once. The file may be copied and changed as you like.
"""

import json
import os
import sys


class Model(object):
    """One release, loaded.

    Args:
        link: Folder of the release, or the link ``current``. A link is followed once: the engine and ``model.json`` are those of
            one release, whatever the link points at a moment later.
        threads: Threads inside one operation.

    Attributes:
        release: Name of the release's folder.
        inputs, outputs: ``{"name", "shape", "dtype"}`` each, in order.
        labels: Names of the classes, or None.
        normalization: What must be done to inputs, or None.
    """

    def __init__(self, link, threads=1):
        self.link, self.threads = os.path.abspath(link), threads
        while True:
            self.folder = os.path.realpath(self.link)
            try:
                self._load()
                return
            except Exception:  # the runtime's own classes have no common base
                # A release that was removed while it was being loaded is no failure where there is another one by now.
                if os.path.realpath(self.link) == self.folder or not os.path.isdir(self.link):
                    raise

    def _load(self):
        with open(os.path.join(self.folder, "model.json"), "rb") as stream:
            told = json.loads(stream.read().decode("utf-8"))
        # Its import would write an identity of the device into the user's home.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        engine = os.path.join(self.folder, told["engine"])
        self._session = onnxruntime.InferenceSession(engine, options, providers=["CPUExecutionProvider"])
        self.release = os.path.basename(self.folder)
        self.inputs, self.outputs = told["inputs"], told["outputs"]
        self.labels, self.normalization = told.get("labels"), told.get("normalization")

    def run(self, arrays):
        """Outputs by name for inputs by name.

        Raises:
            ValueError: An input is missing, or has another shape or dtype than the engine was compiled for.
        """
        for tensor in self.inputs:
            array = arrays.get(tensor["name"])
            found = None if array is None else (list(array.shape), str(array.dtype))
            if found != (tensor["shape"], tensor["dtype"]):
                raise ValueError("input %r must be %s of %s, found %s" % (tensor["name"], tensor["shape"], tensor["dtype"], found))
        names = [tensor["name"] for tensor in self.outputs]
        return dict(zip(names, self._session.run(names, arrays)))

    def fresh(self):
        """This model, or the one that the link points at now; the cost of a call is that of reading a link."""
        same = os.path.realpath(self.link) == self.folder
        return self if same or not os.path.isdir(self.link) else Model(self.link, self.threads)


def main(arguments):
    """Run once on arrays from files, and print what came out."""
    import numpy

    model = Model(os.path.dirname(os.path.realpath(__file__)))
    pairs = [argument.split("=", 1) for argument in arguments]
    try:
        outputs = model.run({name: numpy.load(path, allow_pickle=False) for name, path in pairs})
    except ValueError as error:
        wanted = " ".join("%s=FILE.npy" % tensor["name"] for tensor in model.inputs)
        sys.stderr.write("error: %s. Try: infer.py %s\n" % (error, wanted))
        return 2
    for name, array in outputs.items():
        best = "" if not model.labels or array.size != len(model.labels) else ", best: %s" % model.labels[int(array.argmax())]
        print("%s %s%s" % (name, list(array.shape), best))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
